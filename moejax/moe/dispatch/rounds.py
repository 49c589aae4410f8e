"""Dropless for few tokens: every expert takes its next few rows at once, until none is left.

A batched product over all experts reads their weights where they stand. ``blocks`` copies each
block's weights first, which costs nothing beside hundreds of rows and most of the time beside four.
Experts without rows are multiplied all the same: for as many assignments as experts and more.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch.blocks import blocks
from moejax.moe.dispatch.sorting import sort_assignments
from moejax.moe.experts import ExpertWeights, apply_batched


def rows_of_round(assignments: int, tokens: int, num_experts: int) -> int:
    """Rows of an expert in a round: what one of a balanced load hardly ever exceeds.

    Three deviations above the mean, and no more than a token each; a second round would read all
    weights again.
    """
    mean = assignments / num_experts
    return min(tokens, 4 * math.ceil((mean + 3 * math.sqrt(mean)) / 4))


@jax.custom_vjp
def rounds(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "T D"]:
    """Runs every assignment through its expert, some of every expert's at a time.

    Args:
      x: token vectors.
      expert: chosen experts; indices of E and above are computed by nobody here.
      gate: combine weights.
      weights: the experts.

    Returns:
      The combined outputs. Gradients are those of ``blocks``.
    """
    tokens, choices = expert.shape
    count, flat = weights.num_experts, expert.reshape(-1)
    size = rows_of_round(flat.size, tokens, count)
    plan = sort_assignments(expert, count)
    owner = jnp.minimum(flat, count - 1)
    rank = plan.row.reshape(-1) - plan.starts[owner]
    most, index = jnp.max(plan.counts), jnp.arange(flat.size)

    def some(carry):
        done, total = carry
        here = (flat < count) & (rank >= done) & (rank < done + size)
        slot = jnp.where(here, owner * size + rank - done, count * size)
        source = jnp.full(count * size, flat.size, jnp.int32)
        source = source.at[slot].set(index.astype(jnp.int32), mode="drop")
        rows = x[jnp.minimum(source // choices, tokens - 1)].reshape(count, size, -1)
        weight = jnp.pad(gate.reshape(-1), (0, 1))[source].astype(x.dtype)
        y = apply_batched(weights, rows, weight.reshape(count, size, 1))
        y = y.reshape(count * size, -1)[jnp.minimum(slot, count * size - 1)]
        y = jnp.where(here[:, None], y, 0)
        return done + size, total + jnp.sum(y.reshape(tokens, choices, -1), axis=1)

    start = jnp.int32(0), jnp.zeros_like(x)
    return jax.lax.while_loop(lambda carry: carry[0] < most, some, start)[1]


def _forward(x, expert, gate, weights):
    return rounds(x, expert, gate, weights), (x, expert, gate, weights)


def _backward(saved, cotangent):
    x, expert, gate, weights = saved
    run = lambda x, gate, weights: blocks(x, expert, gate, weights)
    d_x, d_gate, d_weights = jax.vjp(run, x, gate, weights)[1](cotangent)
    return d_x, None, d_gate, d_weights


rounds.defvjp(_forward, _backward)
