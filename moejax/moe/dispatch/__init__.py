"""Dispatchers: how a device runs its tokens through its experts.

Each takes ``(x (T, D), expert (T, K), gate (T, K), weights)`` and returns the combined outputs
(T, D). An expert index of E and above belongs to nobody here: padding, what capacity dropped, or
another device's expert.
"""

from jaxtyping import Array, Float, Int

from moejax.moe.dispatch.blocks import blocks
from moejax.moe.dispatch.capacity import capacity, drop, expert_capacity
from moejax.moe.dispatch.dense_loop import dense_loop
from moejax.moe.dispatch.rounds import rounds
from moejax.moe.dispatch.sorting import SortedAssignments, sort_assignments
from moejax.moe.experts import ExpertWeights

__all__ = [
    "SortedAssignments",
    "blocks",
    "capacity",
    "dense_loop",
    "dispatch",
    "drop",
    "expert_capacity",
    "rounds",
    "sort_assignments",
]


def dispatch(
    name: str,
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
    *,
    slots: int = 0,
) -> Float[Array, "T D"]:
    """Runs a dispatcher by name.

    Args:
      name: ``dense_loop``, ``capacity``, ``blocks``, ``rounds`` or ``grouped``.
      x: token vectors.
      expert: chosen experts.
      gate: combine weights.
      weights: this device's experts.
      slots: the most assignments that an expert can have here, for ``capacity``.

    Returns:
      The combined outputs.
    """
    match name:
        case "dense_loop":
            return dense_loop(x, expert, gate, weights)
        case "capacity":
            return capacity(x, expert, gate, weights, slots=min(slots, expert.size))
        case "blocks":
            return blocks(x, expert, gate, weights)
        case "rounds":
            return rounds(x, expert, gate, weights)
        case "grouped":
            # Here, so that its kernels' libraries load where they are used only.
            from moejax.moe.dispatch.grouped import grouped

            return grouped(x, expert, gate, weights)
    raise ValueError(f"no dispatcher {name!r}")
