"""Mixing: shares by the formula, a schedule with a proven bound, and batches by one integer."""

import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data import epochs_read
from moejax.data.dataset import Part, TextDataset
from moejax.data.mixing import MixedRows, Schedule, shares
from moejax.data.packing import Rows
from moejax.data.store import MemoryStore
from tests import sharded_batches

S = 3
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


def _rows(number: int, count: int, length: int = S):
    """Rows of one document each; the first target of row r is 100 x number + r."""
    flat = [0]
    for r in range(count):
        flat += [100 * number + r] * (length - 1) + [0]
    return Rows(MemoryStore(np.array(flat, np.int32), np.full(count, length, np.int64)), S)


def _mixed(counts=(5, 11, 3), token_shares=(0.5, 0.3, 0.2)):
    return MixedRows([_rows(i, count) for i, count in enumerate(counts)], token_shares)


def _sources(batch):
    return batch["targets"][:, 0] // 100


def test_shares_by_hand():
    assert shares([1, 3]) == [0.25, 0.75]
    # Square roots of 1 and 9.
    assert shares([1, 9], temperature=2) == pytest.approx([0.25, 0.75])
    # mT5's alpha = 0.3 for two languages of 1 and 1000 million examples: 1 : 1000 ** 0.3.
    assert shares([1e6, 1e9], 1 / 0.3)[0] == pytest.approx(1 / (1 + 1000**0.3))
    assert shares([1, 1000, 10], 1e9) == pytest.approx([1 / 3] * 3)


@given(weights=WEIGHTS, temperature=st.floats(1.0, 1e6))
def test_a_higher_temperature_evens_shares_out(weights, temperature):
    plain, hot = shares(weights), shares(weights, temperature)
    assert math.fsum(hot) == pytest.approx(1)
    assert max(hot) <= max(plain) + 1e-12 and min(hot) >= min(plain) - 1e-12
    order = np.argsort(weights, kind="stable")
    assert (np.diff(np.array(hot)[order]) >= 0).all()


@settings(max_examples=200, deadline=None)
@given(parts=WEIGHTS, rows=st.integers(0, 10**12))
def test_each_source_is_within_the_stated_bound_of_its_share(parts, rows):
    schedule = Schedule(parts)
    counts = schedule.counts(rows)
    assert sum(counts) == rows
    fewer = sum(Fraction(1, i) for i in range(1, len(parts)))
    for count, part in zip(counts, schedule.parts, strict=True):
        off = count - Fraction(rows * part, sum(schedule.parts))
        assert -fewer <= off < 1


@settings(max_examples=60, deadline=None)
@given(parts=WEIGHTS, start=st.integers(0, 10**9))
def test_rows_by_random_access_are_those_that_are_counted(parts, start):
    schedule, before = Schedule(parts), Schedule(parts).counts(start)
    for row in range(start, start + 50):
        source, number = schedule[row]
        assert number == before[source]
        before[source] += 1
        assert before == schedule.counts(row + 1)


def test_weights_are_not_rounded_as_grains_own_are():
    # 1 : 1.009 is 1 : 1 there, since it counts in hundredths of the smallest.
    counts = Schedule([1, 1.009]).counts(2_009_000)
    assert counts == [1_000_000, 1_009_000]


def test_a_part_too_small_is_refused():
    with pytest.raises(ValueError, match="a part below"):
        Schedule([1, 1e-20])


@settings(max_examples=8, deadline=None)
@given(
    start=st.integers(0, 12), seed=st.integers(0, 2**40), prefetch=st.integers(0, 3),
    processes=st.sampled_from([1, 2, 3, 6]), weights=st.lists(st.floats(0.1, 9), min_size=3,
                                                              max_size=3),
)  # fmt: skip
def test_a_batch_is_of_its_number_alone(start, seed, prefetch, processes, weights):
    rows = _mixed(token_shares=shares(weights))
    whole = sharded_batches.read(rows, start + 3, batch_size=6, seed=seed, prefetch=0)
    resumed = sharded_batches.read(
        rows, 3, processes=processes, batch_size=6, seed=seed, start=start, prefetch=prefetch
    )
    for left, right in zip(whole[start:], resumed, strict=True):
        sharded_batches.assert_same(left, right)


@settings(max_examples=6, deadline=None)
@given(weights=st.lists(st.floats(0.05, 5), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_shares_after_any_batch_are_within_a_batch(weights, seed):
    parts, size = shares(weights), 4
    batches = sharded_batches.read(_mixed(token_shares=parts), 12, batch_size=size, seed=seed)
    drawn = np.zeros(3)
    for n, batch in enumerate(batches, start=1):
        drawn += np.bincount(_sources(batch), minlength=3)
        assert (abs(drawn - n * size * np.array(parts)) < size).all()


def test_each_source_is_shuffled_anew_in_each_of_its_epochs():
    rows = _mixed()
    batches = sharded_batches.read(rows, 60, batch_size=5, seed=7)
    drawn = np.concatenate([batch["targets"][:, 0] for batch in batches])
    for source, count in enumerate((5, 11, 3)):
        own = drawn[drawn // 100 == source] % 100
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert len(epochs) >= 8
        assert (np.sort(epochs, axis=1) == np.arange(count)).all()
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 2
    # Sources of equal size are not shuffled alike.
    twins = MixedRows([_rows(0, 11), _rows(1, 11)], [0.5, 0.5])
    drawn = np.concatenate([
        batch["targets"][:, 0] for batch in sharded_batches.read(twins, 11, batch_size=2, seed=0)
    ])  # fmt: skip
    assert (drawn[drawn < 100] % 100).tolist() != (drawn[drawn >= 100] % 100).tolist()


def test_another_seed_or_other_weights_give_another_order():
    first = lambda **options: sharded_batches.read(
        _mixed(**options.pop("rows", {})), 4, batch_size=6, **options
    )[3]["targets"].tolist()
    assert first(seed=1) == first(seed=1)
    assert first(seed=1) != first(seed=2)
    assert first(seed=1) != first(seed=1, rows={"token_shares": (0.2, 0.3, 0.5)})


def test_shares_are_of_tokens_where_rows_hold_more_padding():
    # Documents of two targets leave a third of their rows empty; those of one fill theirs.
    padded, full = _rows(0, 20, length=2), _rows(1, 21, length=1)
    assert (padded.tokens_per_row, full.tokens_per_row) == (2, 3)
    mixed = MixedRows([padded, full], [0.5, 0.5])
    counts = mixed.schedule.counts(1000)
    assert counts[0] * 2 == pytest.approx(counts[1] * 3, abs=5)  # a row of each
    assert mixed.tokens_per_row == pytest.approx((counts[0] * 2 + counts[1] * 3) / 1000, rel=1e-3)


def test_rows_are_numbered_through_all_sources():
    rows = _mixed()
    assert len(rows) == 19 and rows.targets == 19 * S
    firsts = [int(rows[i]["targets"][0]) for i in range(19)]
    assert firsts == [*range(5), *range(100, 111), *range(200, 203)]
    for outside in (-1, 19):
        with pytest.raises(IndexError):
            rows[outside]


def test_epochs_are_those_that_the_batches_went_through():
    rows = _mixed()
    batches = sharded_batches.read(rows, 25, batch_size=4, seed=3)
    counts = np.bincount(np.concatenate([_sources(batch) for batch in batches]))
    own = TextDataset(*[None] * 11)
    parts = []
    for label, part in zip("abc", rows.parts, strict=True):
        values = {**vars(own), "train": part}
        parts.append(Part(label, 1 / 3, TextDataset(**values)))
    dataset = TextDataset(**{**vars(own), "train": rows, "parts": tuple(parts)})
    times, sources = epochs_read(dataset, 100)
    assert sources == {"a": counts[0] / 5, "b": counts[1] / 11, "c": counts[2] / 3}
    assert times == pytest.approx(100 / 19)
    assert epochs_read(TextDataset(**{**vars(own), "train": _rows(0, 8)}), 20) == (2.5, {})


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from tests.data.test_mixing import _mixed
from tests import sharded_batches
from moejax.data import batch_fingerprint
print(batch_fingerprint(sharded_batches.read(_mixed(), 1, batch_size=6, seed=11, start=9)[0]))
"""


def test_another_process_draws_the_same_batch():
    from moejax.data import batch_fingerprint

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    here = batch_fingerprint(sharded_batches.read(_mixed(), 10, batch_size=6, seed=11)[9])
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": root}
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(root=root)],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert there.stdout.strip() == here
