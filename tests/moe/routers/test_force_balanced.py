"""Force-balanced routing: exact shares of the batch, distinct experts, and no pattern."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.routers import ForceBalancedOptions, ForceBalancedRouter, RouterInputs
from moejax.moe.routers.force_balanced import spread

ROWS, LENGTH, EXPERTS, TOP_K = 4, 32, 8, 3
choose = jax.jit(spread, static_argnums=2)


@functools.cache
def router(top_k):
    """Routes tokens of E numbers, which are their logits."""
    router = ForceBalancedRouter(ForceBalancedOptions(), EXPERTS, top_k)
    variables = {"params": {"kernel": jnp.eye(EXPERTS)}}
    return jax.jit(lambda x, valid: router.apply(variables, RouterInputs(x, valid)))


def route(x, valid, top_k=TOP_K):
    return router(top_k)(x, valid)


def counts_of(expert):
    return np.bincount(np.asarray(expert).reshape(-1), minlength=EXPERTS + 1)[:EXPERTS]


def everybody():
    return jnp.ones((ROWS, LENGTH), bool)


def tokens(seed=0):
    return jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, EXPERTS))


def test_every_expert_gets_its_share_of_the_valid_tokens():
    # 128 tokens less 5 of padding choose 3 each: 369 = 8 · 46 + 1.
    valid = everybody().at[1, -5:].set(False)
    out = route(tokens(), valid)
    np.testing.assert_array_equal(out.stats["load"], [47] + [46] * 7)
    assert float(out.aux_loss) == 0


def test_nobodys_choice_depends_on_any_token():
    first, second = (route(tokens(seed), everybody()).expert for seed in (1, 2))
    np.testing.assert_array_equal(first, second)


def test_gates_are_a_softmax_over_the_chosen_logits():
    x = tokens()
    out = route(x, everybody())
    chosen = np.exp(np.take_along_axis(np.asarray(x).reshape(-1, EXPERTS), out.expert, axis=1))
    np.testing.assert_allclose(out.gate, chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)


def test_every_full_row_gets_its_share_too():
    # 32 tokens a row, 3 choices each, 8 experts: 12 an expert, up to one for each choice.
    for row in np.asarray(route(tokens(), everybody()).expert).reshape(ROWS, LENGTH, TOP_K):
        assert np.abs(counts_of(row) - 12).max() <= TOP_K


def test_neighbours_experts_have_nothing_to_do_with_one_another():
    expert = np.asarray(route(tokens(), everybody()).expert).reshape(ROWS, LENGTH, TOP_K)
    shared = [len(set(a) & set(b)) for row in expert for a, b in itertools.pairwise(row)]
    # Two unrelated choices of 3 of 8 experts share 9 / 8 on average; equal ones would share 3.
    assert 0.8 < np.mean(shared) < 1.5


def test_a_tokens_experts_are_not_evenly_spaced():
    # In the order of their indices, 4 of 8 experts would stand 2 apart for every token.
    counts = jnp.full(EXPERTS, ROWS * LENGTH // 2)
    expert = np.sort(choose(counts, everybody(), 4), axis=1)
    assert np.mean(np.all(np.diff(expert, axis=1) == 2, axis=1)) <= 0.5


@st.composite
def wanted(draw):
    """Which tokens are valid, and counts that sum to K · n with none above n."""
    valid = np.zeros(ROWS * LENGTH, bool)
    tokens = draw(st.integers(0, valid.size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    valid[rng.permutation(valid.size)[:tokens]] = True
    counts = np.zeros(EXPERTS, np.int32)
    left = tokens * TOP_K
    for i, e in enumerate(rng.permutation(EXPERTS)):
        least = max(0, left - (EXPERTS - 1 - i) * tokens)
        most = min(left, tokens)
        counts[e] = draw(st.sampled_from([least, most, (least + most) // 2]))
        left -= counts[e]
    return valid.reshape(ROWS, LENGTH), counts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(wanted())
def test_spread_gives_exactly_the_wanted_counts_and_no_expert_twice(case):
    valid, counts = case
    expert = np.asarray(choose(jnp.asarray(counts), jnp.asarray(valid), TOP_K))
    assert expert.min() >= 0 and expert.max() < EXPERTS
    mine = expert[valid.reshape(-1)]
    np.testing.assert_array_equal(counts_of(mine), counts)
    assert all(len(set(row)) == TOP_K for row in mine)


@pytest.mark.parametrize("top_k", [1, EXPERTS])
def test_one_expert_and_all_experts(top_k):
    out = route(tokens(), everybody(), top_k=top_k)
    np.testing.assert_array_equal(out.stats["load"], [ROWS * LENGTH * top_k / EXPERTS] * EXPERTS)
    np.testing.assert_allclose(np.sum(out.gate, axis=1), 1, rtol=1e-6)
