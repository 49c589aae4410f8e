"""Dispatchers: how a device runs its tokens through its experts.

Each takes ``(x (T, D), expert (T, K), gate (T, K), weights)`` and returns the combined outputs
(T, D) and the number of assignments it dropped. An expert index of E and above belongs to nobody
here: padding, or another device's expert.
"""

from jaxtyping import Array, Float, Int

from moejax.moe.dispatch.blocks import blocks, default_block_size
from moejax.moe.dispatch.capacity import capacity, expert_capacity
from moejax.moe.dispatch.dense_loop import dense_loop
from moejax.moe.experts import ExpertWeights
from moejax.moe.moe_config import MoEConfig


def dispatch(
    config: MoEConfig,
    group: int,
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
    """Runs the dispatcher that ``config.dispatch`` names.

    Args:
      config: options of the MoE layer.
      group: tokens of a row, the group within which capacity is counted.
      x: token vectors.
      expert: chosen experts.
      gate: combine weights.
      weights: this device's experts.

    Returns:
      The combined outputs and the number of dropped assignments.
    """
    match config.chosen_dispatch:
        case "dense_loop":
            return dense_loop(x, expert, gate, weights)
        case "capacity":
            slots = expert_capacity(group, config.top_k, config.num_experts, config.capacity_factor)
            return capacity(x, expert, gate, weights, group=group, slots=slots)
        case "blocks":
            size = config.block_size or default_block_size(expert.size, config.num_experts)
            return blocks(x, expert, gate, weights, block=size)
        case unknown:
            raise ValueError(f"no dispatcher {unknown!r}")
