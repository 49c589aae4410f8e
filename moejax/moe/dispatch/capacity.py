"""Equally many slots for every expert in each sequence; what does not fit is dropped, counted."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch.gathers import pack, unpack
from moejax.moe.dispatch.sorting import sort_assignments
from moejax.moe.experts import ExpertWeights, apply_batched

DropPolicy = Literal["position", "choice", "probability"]

# Policies under which a later token can displace an earlier one.
LEAKING_POLICIES = ("choice", "probability")


def expert_capacity(group: int, top_k: int, num_experts: int, factor: float) -> int:
    """Slots of one expert for a group of tokens: ceil(factor · group · K / E), at least 1.

    Source: Switch Transformers (arXiv 2101.03961, eq. 3). Never above the group's tokens, since
    a token chooses an expert at most once.
    """
    return min(group, max(1, math.ceil(factor * group * top_k / num_experts)))


def drop(
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    *,
    num_experts: int,
    group: int,
    slots: int,
    policy: DropPolicy = "position",
) -> tuple[Int[Array, "T K"], Float[Array, ""]]:
    """Takes away the assignments that find no slot: their index becomes E.

    A group is a sequence, so that drops do not depend on how rows are spread over devices.

    Args:
      expert: chosen experts, groups one after another; E and above is padding and takes no slot.
      gate: combine weights, which ``probability`` orders by.
      num_experts: E.
      group: tokens of a group; divides T.
      slots: slots of an expert in a group.
      policy: who comes first. ``position``: tokens in their order, a token's choices in theirs,
        so that a later token never displaces an earlier one. ``choice``: all first choices before
        any second (GShard, arXiv 2006.16668, algorithm 1). ``probability``: as ``choice``, tokens
        in the order of their largest gate (V-MoE's batch-prioritised routing, arXiv 2106.05974,
        section 4.1). The last two leak later tokens into earlier ones.

    Returns:
      The remaining choices, and how many were dropped.
    """
    top_k = expert.shape[1]
    choices = expert.reshape(-1, group, top_k)
    tokens, nth = jnp.arange(group)[None, :, None], jnp.arange(top_k)[None, None, :]
    if policy == "probability":
        largest = jnp.max(gate.reshape(choices.shape), axis=-1)
        priority = jnp.argsort(-largest, axis=1, stable=True)
        tokens = jnp.argsort(priority, axis=1)[:, :, None]
    turn = tokens * top_k + nth if policy == "position" else nth * group + tokens
    turn = jnp.broadcast_to(turn, choices.shape).reshape(len(choices), -1)

    def kept_of_group(choices, turn):
        in_turn = jnp.zeros_like(choices).at[turn].set(choices, unique_indices=True)
        plan = sort_assignments(in_turn[:, None], num_experts)
        start = plan.starts[jnp.minimum(in_turn, num_experts - 1)]
        return ((plan.row[:, 0] - start < slots) & (in_turn < num_experts))[turn]

    kept = jax.vmap(kept_of_group)(choices.reshape(len(choices), -1), turn).reshape(expert.shape)
    dropped = jnp.sum(expert < num_experts) - jnp.sum(kept)
    return jnp.where(kept, expert, num_experts), dropped.astype(jnp.float32)


def capacity(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
    *,
    slots: int,
) -> Float[Array, "T D"]:
    """Runs every expert over a buffer of equally many slots, in one batched product.

    Args:
      x: token vectors.
      expert: chosen experts, of which ``drop`` has left at most ``slots`` of each; indices of E
        and above are computed by nobody here.
      gate: combine weights.
      weights: the experts.
      slots: rows of an expert's buffer.

    Returns:
      The combined outputs.
    """
    top_k, num_experts = expert.shape[1], weights.num_experts
    plan = sort_assignments(expert, num_experts)
    place = jnp.arange(slots, dtype=jnp.int32)[None, :]
    filled = place < plan.counts[:, None]
    entry = jnp.minimum(plan.starts[:, None] + place, expert.size - 1)
    assignment = jnp.where(filled, plan.order[entry], expert.size).reshape(-1)
    owner = jnp.minimum(expert, num_experts - 1)
    slot = owner * slots + plan.row - plan.starts[owner]
    slot = jnp.where(expert < num_experts, slot, num_experts * slots)
    token = assignment // top_k
    rows = pack(x, token, slot).reshape(num_experts, slots, -1)
    weight = pack(gate.reshape(-1, 1), assignment, slot.reshape(-1, 1)).astype(x.dtype)
    outputs = apply_batched(weights, rows, weight.reshape(num_experts, slots, 1))
    return unpack(outputs.reshape(num_experts * slots, -1), token, slot)
