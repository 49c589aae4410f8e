"""Capacity: slots and drops counted by hand, the order of dropping, and independent groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.dispatch.capacity import LEAKING_POLICIES, capacity, drop, expert_capacity
from moejax.moe.experts import ExpertWeights

WIDTH = 4


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def kept(expert, gate, num_experts, group, slots, policy):
    return drop(expert, gate, num_experts=num_experts, group=group, slots=slots, policy=policy)


def run(expert, *, group, slots, policy="position", gate=None, experts=2):
    """The choices that are left, as nested lists (``experts`` where one was dropped), and drops."""
    expert = jnp.asarray(expert, jnp.int32)
    gate = jnp.ones(expert.shape) if gate is None else jnp.asarray(gate, jnp.float32)
    left, dropped = kept(expert, gate, experts, group, slots, policy)
    return left.tolist(), float(dropped)


def test_the_earliest_positions_keep_their_slots_in_every_group():
    # Two groups of four tokens, K = 1, two slots an expert. Index 2 is padding.
    # Group 0 chooses 0 0 0 1: the third is dropped. Group 1 chooses 0 0 1 -: none is.
    left, dropped = run([[0], [0], [0], [1], [0], [0], [1], [2]], group=4, slots=2)
    assert left == [[0], [0], [2], [1], [0], [0], [1], [2]]
    assert dropped == 1


def test_slots_fill_by_position_first_and_by_choice_second():
    # One slot an expert. Token 0 takes both with its two choices, so token 1, whose first choice
    # is expert 1, loses both. Choice-major order would give expert 1 to token 1: a leak, as token
    # 0's output would then depend on a later token.
    assert run([[0, 1], [1, 0]], group=2, slots=1) == ([[0, 1], [2, 2]], 2)


def test_by_choice_all_first_choices_come_before_any_second():
    # One slot an expert, three tokens with choices (0, 1), (1, 2), (1, 0).
    # First choices in order: 0 gets expert 0, 1 gets expert 1, 2 finds expert 1 full.
    # Second choices: 0 finds expert 1 full, 1 gets expert 2, 2 finds expert 0 full.
    left, dropped = run(
        [[0, 1], [1, 2], [1, 0]], group=3, slots=1, policy="choice", experts=3
    )  # fmt: skip
    assert left == [[0, 3], [1, 2], [3, 3]]
    assert dropped == 3


def test_by_probability_tokens_with_the_largest_gate_come_first():
    # As above, but largest gates 0.5, 0.6, 0.9 put the tokens in the order 2, 1, 0.
    # First choices: 2 gets expert 1, 1 finds expert 1 full, 0 gets expert 0.
    # Second choices: 2 finds expert 0 full, 1 gets expert 2, 0 finds expert 1 full.
    left, dropped = run(
        [[0, 1], [1, 2], [1, 0]], group=3, slots=1, policy="probability", experts=3,
        gate=[[0.5, 0.1], [0.6, 0.3], [0.9, 0.05]],
    )  # fmt: skip
    assert left == [[0, 3], [3, 2], [1, 3]]
    assert dropped == 3
    # Equal gates fall back to position: the case above.
    equal = run([[0, 1], [1, 2], [1, 0]], group=3, slots=1, policy="probability", experts=3)
    assert equal == ([[0, 3], [1, 2], [3, 3]], 3)


def test_what_leaks_and_what_does_not():
    # Token 0's second choice is expert 1. Whether token 1 chooses expert 1 first decides whether
    # token 0 keeps it, under the policies called leaking only.
    for policy in ("position", *LEAKING_POLICIES):
        gate = [[0.5, 0.4], [0.9, 0.1]]
        calm, _ = run([[0, 1], [2, 0]], group=2, slots=1, policy=policy, gate=gate, experts=3)
        wanted, _ = run([[0, 1], [1, 0]], group=2, slots=1, policy=policy, gate=gate, experts=3)
        assert (calm[0] != wanted[0]) == (policy in LEAKING_POLICIES), policy


def test_padding_takes_no_slot_and_is_no_drop():
    # Padding stands before the valid tokens; with one slot the first valid token still gets it.
    assert run([[2], [2], [0], [0]], group=4, slots=1) == ([[2], [2], [0], [2]], 1)


def test_groups_do_not_know_one_another():
    before, _ = run([[0], [1], [0], [0]], group=2, slots=1)
    after, _ = run([[0], [0], [0], [0]], group=2, slots=1)
    assert before[2:] == after[2:] == [[0], [2]]


def first_come(expert, order, num_experts, slots):
    """Slots handed out one by one in an order of (token, choice)."""
    left, taken = np.full_like(expert, num_experts), np.zeros(num_experts, int)
    for t, k in order:
        e = expert[t, k]
        if e < num_experts and taken[e] < slots:
            taken[e] += 1
            left[t, k] = e
    return left


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["position", "choice", "probability"]))
def test_drops_equal_handing_out_slots_one_by_one(seed, policy):
    rng = np.random.default_rng(seed)
    tokens, top_k, num_experts, slots = 10, 3, 4, 3
    rows = [rng.permutation(num_experts + 1)[:top_k] for _ in range(2 * tokens)]
    expert = np.stack(rows).astype(np.int32)
    gate = rng.permutation(expert.size).reshape(expert.shape).astype(np.float32)
    got, dropped = kept(expert, gate, num_experts, tokens, slots, policy)
    wanted = []
    for part in (slice(0, tokens), slice(tokens, None)):
        turn = np.arange(tokens)
        if policy == "probability":
            turn = np.argsort(-gate[part].max(axis=1))
        order = [(t, k) for k in range(top_k) for t in turn]
        order = sorted(order) if policy == "position" else order
        wanted.append(first_come(expert[part], order, num_experts, slots))
    wanted = np.concatenate(wanted)
    np.testing.assert_array_equal(got, wanted)
    assert float(dropped) == np.sum(expert < num_experts) - np.sum(wanted < num_experts)


def test_a_dropped_token_gets_no_output_and_no_gradient():
    def objective(x):
        expert, gate = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1))
        weights = ExpertWeights(jnp.ones((1, WIDTH, 2, 3)), jnp.ones((1, 3, WIDTH)))
        expert, dropped = drop(expert, gate, num_experts=1, group=3, slots=2)
        y = capacity(x, expert, gate, weights, slots=2)
        return jnp.sum(y), (y, dropped)

    gradient, (y, dropped) = jax.jit(jax.grad(objective, has_aux=True))(jnp.ones((3, WIDTH)))
    assert np.all(np.asarray(gradient)[:2] != 0) and np.all(np.asarray(y)[:2] != 0)
    np.testing.assert_array_equal(gradient[2], np.zeros(WIDTH))
    np.testing.assert_array_equal(y[2], np.zeros(WIDTH))
    assert float(dropped) == 1


@pytest.mark.parametrize(
    ("group", "top_k", "experts", "factor", "slots"),
    [
        (64, 2, 8, 1.0, 16),  # 64 · 2 / 8
        (64, 2, 8, 1.25, 20),
        (10, 1, 4, 1.0, 3),  # 2.5, rounded up
        (4, 1, 64, 1.0, 1),  # never none
        (8, 2, 4, 10.0, 8),  # never more than tokens, which choose an expert once at most
    ],
)
def test_slots_of_an_expert(group, top_k, experts, factor, slots):
    assert expert_capacity(group, top_k, experts, factor) == slots
