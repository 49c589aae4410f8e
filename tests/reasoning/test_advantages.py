"""Advantages, dynamic sampling and overlong shaping, by hand and by their invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax.reasoning.advantages import (
    group_advantages,
    keep_groups_with_spread,
    overlong_rewards,
)

# Sixteenths: sums and means are exact, so equal rewards are equal.
REWARDS = arrays(np.float32, (3, 4), elements=st.integers(-32, 32).map(lambda i: i / 16))


def test_by_hand():
    # Two questions of four: the first right once, the second always.
    rewards = np.float32([1, 0, 0, 0, 1, 1, 1, 1])
    # mean 1/4; deviations 3/4, -1/4 three times; their squares sum to 12/16, over 3 is 1/4: 1/2.
    wanted = np.float32([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(group_advantages(rewards, 4), wanted, rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, 4, divide=False), wanted / 2, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(REWARDS, st.integers(-8, 8), st.sampled_from([0.25, 2.0, 1024.0]))
def test_shift_and_scale(rewards, shift, scale):
    flat = rewards.reshape(-1)
    plain, divided = group_advantages(flat, 4, False), group_advantages(flat, 4)
    near = lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    near(group_advantages(flat + shift, 4, False), plain)
    near(group_advantages(flat + shift, 4), divided)
    near(group_advantages(scale * flat, 4), divided)  # the deviation takes the scale away
    near(group_advantages(scale * flat, 4, False) / scale, plain)
    for found in (plain, divided):
        near(np.sum(np.reshape(found, (3, 4)), axis=1), np.zeros(3))
    spread = np.ptp(rewards, axis=1) > 0
    squares = np.sum(np.reshape(divided, (3, 4)) ** 2, axis=1)
    near(squares, np.where(spread, 3.0, 0.0))  # a sample deviation of 1


@settings(max_examples=20, deadline=None)
@given(st.floats(-1e3, 1e3, width=32), st.booleans())
def test_equal_rewards_have_exactly_no_advantage(reward, divide):
    rewards = np.full(6, reward, np.float32)
    assert not np.any(group_advantages(rewards, 3, divide))
    kept = keep_groups_with_spread(rewards, 3)
    assert not np.any(kept.rows) and kept.dropped == 2


def test_groups_without_spread_are_dropped():
    kept = keep_groups_with_spread(np.float32([1, 0, 1, 1, 0, 0, 0.5, 0.25]), 2)
    assert kept.rows.tolist() == [True, True, False, False, False, False, True, True]
    assert kept.dropped == 2


@pytest.mark.parametrize("size, count", [(1, 4), (3, 4), (0, 4)])
def test_rewards_that_are_not_whole_groups_are_refused(size, count):
    for function in (group_advantages, keep_groups_with_spread):
        with pytest.raises(ValueError, match="whole groups"):
            function(np.zeros(count, np.float32), size)


def test_overlong_shaping_by_hand():
    # Longest 20, buffer a quarter: from 15 to 20 the penalty grows by a fifth of it a token.
    lengths = np.int32([1, 15, 16, 18, 20, 25])
    wanted = [0, 0, -0.2, -0.6, -1, -1]
    np.testing.assert_allclose(overlong_rewards(lengths, 20, 0.25), wanted, atol=1e-6)
    halved = overlong_rewards(lengths, 20, 0.25, penalty=0.5)
    np.testing.assert_allclose(halved, np.array(wanted) / 2, atol=1e-6)
    assert not np.any(overlong_rewards(lengths, 20, 0.0))


def test_overlong_shaping_with_the_paper_s_lengths():
    # 20,480 tokens, the last 4,096 of them the buffer.
    lengths = np.int32([16384, 16385, 18432, 20480])
    wanted = [0, -1 / 4096, -0.5, -1]
    np.testing.assert_allclose(overlong_rewards(lengths, 20480, 0.2), wanted, atol=1e-6)
