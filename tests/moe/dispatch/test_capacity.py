"""Capacity: slots and drops counted by hand, the order of dropping, and independent groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.dispatch.capacity import capacity, expert_capacity
from moejax.moe.experts import ExpertWeights

WIDTH = 4


def run(expert, *, group, slots, x=None, experts=2):
    """Experts whose output is the token times 1 + their index (up to the activation)."""
    expert = jnp.asarray(expert, jnp.int32)
    tokens = expert.shape[0]
    x = jnp.ones((tokens, WIDTH)) if x is None else x
    scale = (1.0 + jnp.arange(experts)).reshape(-1, 1, 1)
    eye = jnp.broadcast_to(jnp.eye(WIDTH)[None], (experts, WIDTH, WIDTH))
    weights = ExpertWeights(jnp.stack([eye, eye], axis=2), eye * scale)
    compute = jax.jit(functools.partial(capacity, group=group, slots=slots))
    y, dropped = compute(x, expert, jnp.ones(expert.shape), weights)
    # silu(1) · 1 is the hidden value of every channel of a token of ones.
    return np.asarray(y)[:, 0] / float(jax.nn.silu(1.0)), float(dropped)


def test_the_earliest_positions_keep_their_slots_in_every_group():
    # Two groups of four tokens, K = 1, two slots an expert. Index 2 is padding.
    # Group 0 chooses 0 0 0 1: the third is dropped. Group 1 chooses 0 0 1 -: none is.
    y, dropped = run([[0], [0], [0], [1], [0], [0], [1], [2]], group=4, slots=2)
    np.testing.assert_allclose(y, [1, 1, 0, 2, 1, 1, 2, 0], rtol=1e-6)
    assert dropped == 1


def test_slots_fill_by_position_first_and_by_choice_second():
    # One slot an expert. Token 0 takes both with its two choices, so token 1, whose first choice
    # is expert 1, loses both. Choice-major order would give expert 1 to token 1: a leak, as token
    # 0's output would then depend on a later token.
    y, dropped = run([[0, 1], [1, 0]], group=2, slots=1)
    np.testing.assert_allclose(y, [1 + 2, 0], rtol=1e-6)
    assert dropped == 2


def test_padding_takes_no_slot_and_is_no_drop():
    # Padding stands before the valid tokens; with one slot the first valid token still gets it.
    y, dropped = run([[2], [2], [0], [0]], group=4, slots=1)
    np.testing.assert_allclose(y, [0, 0, 1, 0], rtol=1e-6)
    assert dropped == 1


def test_groups_do_not_know_one_another():
    before, _ = run([[0], [1], [0], [0]], group=2, slots=1)
    after, _ = run([[0], [0], [0], [0]], group=2, slots=1)
    np.testing.assert_array_equal(before[2:], after[2:])
    np.testing.assert_allclose(after, [1, 0, 1, 0], rtol=1e-6)


def test_a_dropped_token_gets_no_gradient():
    def objective(x):
        expert = jnp.zeros((3, 1), jnp.int32)
        weights = ExpertWeights(jnp.ones((1, WIDTH, 2, 3)), jnp.ones((1, 3, WIDTH)))
        return jnp.sum(capacity(x, expert, jnp.ones((3, 1)), weights, group=3, slots=2)[0])

    gradient = np.asarray(jax.jit(jax.grad(objective))(jnp.ones((3, WIDTH))))
    assert np.all(gradient[:2] != 0)
    np.testing.assert_array_equal(gradient[2], np.zeros(WIDTH))


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
