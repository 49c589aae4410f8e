"""Batches: resumed by one integer, shared between processes, and every row once an epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.data import batch_fingerprint, train_iterator, validation_batches
from moejax.data.packing import Rows
from moejax.data.store import MemoryStore

ROWS, S = 11, 3


@pytest.fixture(scope="module")
def rows():
    """Eleven full rows; row r holds the targets 3r + 1, 3r + 2 and the separator."""
    flat = [0]
    for r in range(ROWS):
        flat += [3 * r + 1, 3 * r + 2, 0]
    return Rows(MemoryStore(np.array(flat, np.uint16), np.full(ROWS, S, np.int64)), S)


def _take(rows, count, **kwargs):
    iterator = train_iterator(rows, **kwargs)
    batches = [next(iterator) for _ in range(count)]
    assert iterator.position == kwargs.get("start", 0) + count
    iterator.close()
    return batches


def _same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@settings(max_examples=12, deadline=None)
@given(start=st.integers(0, 9), seed=st.integers(0, 2**40), prefetch=st.integers(0, 3))
def test_a_resumed_iterator_sees_what_an_uninterrupted_one_does(rows, start, seed, prefetch):
    # Four rows a batch: the third batch reaches over the end of the first epoch of eleven.
    whole = _take(rows, 12, batch_size=4, seed=seed, prefetch=0)
    resumed = _take(rows, 12 - start, batch_size=4, seed=seed, start=start, prefetch=prefetch)
    for left, right in zip(whole[start:], resumed, strict=True):
        _same(left, right)


def test_every_row_once_an_epoch_in_a_new_order_each(rows):
    batches = _take(rows, ROWS, batch_size=3, seed=5)
    order = np.concatenate([batch["targets"][:, 0] // 3 for batch in batches])
    epochs = order.reshape(3, ROWS)
    assert (np.sort(epochs, axis=1) == np.arange(ROWS)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert _take(rows, 1, batch_size=11, seed=6)[0]["targets"][:, 0].tolist() != epochs[0].tolist()


def test_a_batch_of_one_row(rows):
    """Its endless order has one batch for each number that Python can count, and no more."""
    order = [int(batch["targets"][0, 0]) // 3 for batch in _take(rows, ROWS, batch_size=1, seed=5)]
    assert sorted(order) == list(range(ROWS))


@pytest.mark.parametrize("taken", [[0, 1], [2, 3], [0, 2], [3]])
def test_a_process_reads_the_rows_that_it_takes(rows, taken):
    whole = _take(rows, 5, batch_size=4, seed=1, start=2)
    parts = _take(rows, 5, batch_size=4, seed=1, start=2, take=np.array(taken))
    for batch, part in zip(whole, parts, strict=True):
        _same({name: batch[name][taken] for name in batch}, part)


def test_validation_rows_once_and_the_last_batch_filled_with_padding(rows):
    batches = list(validation_batches(rows, batch_size=4))
    assert [batch["tokens"].shape for batch in batches] == [(4, S)] * 3
    assert (batches[2]["segment_ids"][3] == 0).all()
    targets = np.concatenate([batch["targets"] for batch in batches])
    real = np.concatenate([batch["segment_ids"] for batch in batches]) > 0
    assert real.sum() == rows.targets
    assert targets[real].reshape(ROWS, S)[:, 0].tolist() == [3 * r + 1 for r in range(ROWS)]
    assert len(list(validation_batches(rows, batch_size=4, max_batches=2))) == 2
    for batch, part in zip(
        batches, validation_batches(rows, batch_size=4, take=np.array([0, 3])), strict=True
    ):
        _same({name: batch[name][[0, 3]] for name in batch}, part)


def test_fewer_rows_than_a_batch_is_refused(rows):
    with pytest.raises(ConfigError, match=r"train\.batch_size = 12: is more than the 11 rows"):
        train_iterator(rows, batch_size=12, seed=0)


def test_batch_fingerprint_is_of_the_tokens(rows):
    one, two = _take(rows, 2, batch_size=4, seed=0)
    assert batch_fingerprint(one) == batch_fingerprint({"tokens": one["tokens"].copy()})
    assert batch_fingerprint(one) != batch_fingerprint(two)
    assert len(batch_fingerprint(one)) == 64
