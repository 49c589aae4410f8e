"""Drawn routing: counts exact, experts distinct, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.bench.loads import LOADS, draw_routing, expert_counts, max_over_mean

sizes = st.integers(1, 24).flatmap(
    lambda experts: st.tuples(st.integers(1, 90), st.just(experts), st.integers(1, min(experts, 8)))
)


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from(LOADS), st.integers(0, 3))
def test_each_token_has_distinct_experts_and_each_expert_its_count(size, load, seed):
    tokens, num_experts, top_k = size
    expert, gate = draw_routing(load, tokens, num_experts, top_k, seed)
    assert expert.shape == gate.shape == (tokens, top_k)
    assert expert.dtype == np.int32 and gate.dtype == np.float32
    assert all(len(set(row)) == top_k for row in expert.tolist())
    counts = np.bincount(expert.reshape(-1), minlength=num_experts)
    assert len(counts) == num_experts
    wanted = expert_counts(load, tokens, num_experts, top_k)
    assert counts[0] == wanted[0] == wanted.max()
    np.testing.assert_array_equal(np.sort(counts), np.sort(wanted))
    assert gate.min() > 0
    np.testing.assert_allclose(gate.sum(axis=1), 1, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_counts_of_each_load(size):
    tokens, num_experts, top_k = size
    total = tokens * top_k
    counts = {load: expert_counts(load, *size) for load in LOADS}
    for load in LOADS:
        assert counts[load].sum() == total
        assert counts[load].min() >= 0 and counts[load].max() <= tokens
    assert np.ptp(counts["balanced"]) <= 1
    # The fullest has 4 times the mean, or every token where that is less.
    assert counts["skewed"][0] == min(tokens, max(1, round(4 * total / num_experts)))
    assert np.all(np.diff(counts["skewed"]) <= 1)
    assert counts["worst"][0] == tokens
    assert num_experts == 1 or np.ptp(counts["worst"][1:]) <= 1


def test_the_skewed_load_falls_off_from_four_times_the_mean():
    counts = expert_counts("skewed", 8192, 32, 4)
    assert max_over_mean(counts) == 4.0
    # Geometric: each over the one before is the same, up to rounding.
    ratios = counts[1:10] / counts[:9]
    assert np.ptp(ratios) < 0.01
    assert np.median(counts) < counts.mean()


def test_balanced_is_exact():
    assert set(expert_counts("balanced", 8192, 128, 4)) == {256}
    assert max_over_mean(expert_counts("balanced", 8192, 128, 4)) == 1.0


@pytest.mark.parametrize("load", LOADS)
def test_a_seed_gives_the_same_routing_and_another_another(load):
    first, second, other = (draw_routing(load, 64, 8, 2, seed) for seed in (0, 0, 1))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(first[0] != other[0])


def test_tokens_are_random_and_neighbours_are_not_alike():
    """Sorted-looking routing would flatter a sort and a gather."""
    expert, _ = draw_routing("balanced", 4096, 16, 2)
    counts = np.stack(
        [np.bincount(part.reshape(-1), minlength=16) for part in expert.reshape(8, -1, 2)]
    )
    # 1,024 draws of 16 experts: 64 each, give or take 8.
    assert 4 < counts.std(axis=1).mean() < 12
    pairs = {tuple(sorted(row)) for row in expert.tolist()}
    assert len(pairs) == 16 * 15 // 2
