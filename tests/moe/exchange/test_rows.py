"""Rows between devices: how many, what they carry, and their order in rounds."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.exchange.rows import (
    carried_choices,
    earlier_of_owner,
    expected_rows,
    most_rows,
    plan_round,
    plan_sends,
    round_rows,
)


@pytest.mark.parametrize(
    ("carried", "experts", "top_k", "devices", "rows"),
    [
        (1, 8, 1, 4, 1 / 4),  # one expert: a quarter of the tokens
        (2, 8, 2, 2, 1 - 6 / 28),  # unless both are elsewhere: (4 choose 2) / (8 choose 2)
        (1, 8, 2, 2, 1.0),  # one row a choice: K / n
        (4, 4, 4, 2, 1.0),  # every token chooses every expert
        (1, 4, 4, 2, 2.0),
    ],
)
def test_expected_rows_by_hand(carried, experts, top_k, devices, rows):
    assert expected_rows(carried, experts, top_k, devices) == pytest.approx(rows)


def test_expected_rows_are_the_mean_over_random_choices():
    rng = np.random.default_rng(0)
    there = np.array([np.sum(rng.permutation(32)[:6] < 8) for _ in range(20_000)])
    for carried in (1, 2, 3, 6):
        mean = np.ceil(there / carried).mean()
        assert expected_rows(carried, 32, 6, 4) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(
    ("experts", "top_k", "devices", "carried"),
    [
        (8, 2, 2, 2),  # 1.00 rows instead of 0.79 would be too many
        (8, 2, 4, 1),  # 0.50 instead of 0.46 are not
        (8, 2, 8, 1),  # one expert a device
        (64, 8, 8, 2),  # 0.75 rows of two instead of 0.68 of eight
        (256, 8, 64, 1),
        (64, 8, 1, 8),
    ],
)
def test_choices_that_a_row_carries(experts, top_k, devices, carried):
    assert carried_choices(experts, top_k, devices) == carried


@pytest.mark.parametrize(
    ("factor", "tokens", "experts", "top_k", "devices", "rows"),
    [
        (1.25, 100, 8, 1, 4, 32),  # a quarter of 125: 31.25, rounded up
        (1.0, 70, 8, 2, 2, 55),  # 22/28 of them
        (2.0, 70, 8, 2, 2, 70),  # never more than all
        (9.0, 10, 8, 2, 4, 20),  # all: two rows a token, of one choice each
        (0.001, 9, 64, 1, 64, 1),  # never none
    ],
)
def test_rows_of_a_round(factor, tokens, experts, top_k, devices, rows):
    assert round_rows(factor, tokens, experts, top_k, devices) == rows
    assert rows <= tokens * most_rows(experts, top_k, devices)


def test_earlier_choices_of_the_same_owner_by_hand():
    owner = jnp.array([[2, 0, 2, 2], [1, 1, 1, 1], [3, 0, 3, 1]])
    np.testing.assert_array_equal(
        earlier_of_owner(owner), [[0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 1, 0]]
    )


def test_a_plan_by_hand():
    # Eight experts on two devices, three choices a token, of which a row carries two (see below).
    assert carried_choices(8, 3, 2) == 2
    # Token 0: experts 0 1 2 on device 0: a row of two and a row of one.
    # Token 1: 5 on device 1; 3 and 0 on device 0, in one row. Token 2: padding.
    expert = jnp.array([[0, 1, 2], [5, 3, 0], [8, 8, 8]])
    plan = plan_sends(expert, 4, 2, False)
    np.testing.assert_array_equal(plan.destination, [[0, 0, 2], [1, 0, 2], [2, 2, 2]])
    # Choices by their place t · 3 + k, 9 for none.
    assert plan.choice.tolist()[:2] == [[[0, 1], [2, 9], [9, 9]], [[3, 9], [4, 5], [9, 9]]]
    # Rounds of two rows to each device: rows 0 0 to device 0 and row 1 to device 1; then row 1.
    first, second = (plan_round(plan, index, 2) for index in (0, 1))
    assert first.token.tolist() == [0, 0, 1, 3] and first.sent.tolist() == [2, 1]
    assert first.choice.tolist() == [0, 1, 2, 9, 3, 9, 9, 9]
    assert first.row.tolist() == [[0, 1, 4], [2, 4, 4], [4, 4, 4]]
    assert first.slot[:, 0].tolist() == [0, 1, 2, 4, 8, 8, 8, 8, 8]
    assert second.token.tolist() == [1, 3, 3, 3] and second.sent.tolist() == [1, 0]
    assert second.choice.tolist() == [4, 5, 9, 9, 9, 9, 9, 9]


TOKENS, TOP_K, EXPERTS, SIZE = 10, 3, 12, 3


@functools.partial(jax.jit, static_argnums=2)
def rows_of(expert, index, devices):
    return plan_round(plan_sends(expert, EXPERTS // devices, devices, False), index, SIZE)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 12]), st.sampled_from([1, 30]))
def test_every_choice_goes_once_to_its_device_in_as_few_rows_as_it_takes(seed, devices, skew):
    rng = np.random.default_rng(seed)
    chance = np.array([skew, skew] + [1] * (EXPERTS - 1), np.float64)
    draw = lambda: rng.choice(EXPERTS + 1, TOP_K, replace=False, p=chance / chance.sum())
    expert = np.stack([draw() for _ in range(TOKENS)]).astype(np.int32)
    carried, none = carried_choices(EXPERTS, TOP_K, devices), TOKENS * TOP_K
    seen, rows = collections.Counter(), collections.Counter()
    for index in range(math.ceil(TOKENS * most_rows(EXPERTS, TOP_K, devices) / SIZE)):
        this = jax.device_get(rows_of(jnp.asarray(expert), index, devices))
        tokens = this.token.reshape(devices, SIZE)
        filled = tokens < TOKENS
        np.testing.assert_array_equal(filled.sum(axis=1), this.sent)
        # In each destination's rows the filled ones come first, in the order of the tokens.
        assert all(list(row) == sorted(row) for row in tokens)
        rows.update((int(t), j) for j in range(devices) for t in tokens[j] if t < TOKENS)
        choices = this.choice.reshape(devices, SIZE, carried)
        for j, n in zip(*np.nonzero(filled), strict=True):
            held = choices[j, n][choices[j, n] < none]
            assert len(held) and np.all(held // TOP_K == tokens[j, n])
            assert np.all(expert.reshape(-1)[held] // (EXPERTS // devices) == j)
            seen.update(held.tolist())
        assert np.all(choices[~filled] == none)
        # Both pairs of directions are inverses.
        here = this.row < devices * SIZE
        np.testing.assert_array_equal(this.token[this.row[here]], np.nonzero(here)[0])
        assert here.sum() == filled.sum()
        placed = np.flatnonzero(this.slot[:, 0] < devices * SIZE * carried)
        np.testing.assert_array_equal(this.choice[this.slot[placed, 0]], placed)
        assert len(placed) == np.sum(this.choice < none)
    valid = np.flatnonzero(expert.reshape(-1) < EXPERTS)
    assert seen == collections.Counter(valid.tolist())
    owner = expert.reshape(-1) // (EXPERTS // devices)
    there = collections.Counter((c // TOP_K, owner[c]) for c in valid)
    assert rows == {at: math.ceil(count / carried) for at, count in there.items()}
