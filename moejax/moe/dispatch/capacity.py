"""Equally many slots for every expert in each sequence; what does not fit is dropped, counted."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.experts import ExpertWeights, apply_batched


def expert_capacity(group: int, top_k: int, num_experts: int, factor: float) -> int:
    """Slots of one expert for a group of tokens: ceil(factor · group · K / E), at least 1.

    Source: Switch Transformers (arXiv 2101.03961, eq. 3). Never above the group's tokens, since
    a token chooses an expert at most once.
    """
    return min(group, max(1, math.ceil(factor * group * top_k / num_experts)))


def capacity(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
    *,
    group: int,
    slots: int,
) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
    """Fills each expert's slots in the order (position, k) and drops the rest.

    A group is a sequence, so that drops do not depend on how rows are spread over devices, and
    the order is that of positions, so that a later token never displaces an earlier one.

    Args:
      x: token vectors, groups one after another.
      expert: chosen experts; indices of E and above are computed by nobody here and take no slot.
      gate: combine weights.
      weights: the experts.
      group: tokens of a group; divides T.
      slots: slots of an expert in a group.

    Returns:
      The combined outputs, and the number of dropped assignments.
    """
    top_k, num_experts = expert.shape[1], weights.num_experts
    groups = len(x) // group
    choices = expert.reshape(groups, group * top_k)
    one_hot = choices[:, :, None] == jnp.arange(num_experts)[None, None, :]
    earlier = jnp.cumsum(one_hot, axis=1, dtype=jnp.int32) - 1
    place = jnp.take_along_axis(earlier, jnp.minimum(choices, num_experts - 1)[:, :, None], axis=2)
    place = place[:, :, 0]
    here = choices < num_experts
    kept = here & (place < slots)
    # Buffer rows are laid out (expert, group, slot); one more row takes what is dropped.
    total = num_experts * groups * slots
    row = (choices * groups + jnp.arange(groups)[:, None]) * slots + place
    row = jnp.where(kept, row, total).reshape(-1)
    source = jnp.full(total + 1, len(row), jnp.int32).at[row].set(jnp.arange(len(row)))[:total]
    filled = source < len(row)
    rows = jnp.where(filled[:, None], x[jnp.minimum(source // top_k, len(x) - 1)], 0)
    outputs = apply_batched(weights, rows.reshape(num_experts, groups * slots, -1))
    outputs = jnp.concatenate([outputs.reshape(total, -1), jnp.zeros_like(x[:1])])
    weight = jnp.where(kept.reshape(expert.shape), gate, 0.0).astype(x.dtype)
    combined = jnp.einsum("tkd,tk->td", outputs[row].reshape(*expert.shape, -1), weight)
    dropped = jnp.sum(here) - jnp.sum(kept)
    return combined, jax.lax.stop_gradient(dropped.astype(jnp.float32))
