"""Assignments in the order of their experts: what the dropless dispatchers and capacity share."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class SortedAssignments:
    """The T · K assignments as rows sorted by expert; nobody's (index E and above) come last.

    Attributes:
      order: assignment (t · K + k) of each row, in the order of tokens inside an expert.
      row: row of each assignment, the inverse of ``order``.
      counts: rows of each expert.
      starts: first row of each expert.
    """

    order: Int[Array, " M"]
    row: Int[Array, "T K"]
    counts: Int[Array, " E"]
    starts: Int[Array, " E"]


def sort_assignments(expert: Int[Array, "T K"], num_experts: int) -> SortedAssignments:
    """Sorts assignments by expert, stably; one sort, whose inverse is a scatter.

    Args:
      expert: chosen experts; indices of E and above belong to nobody here.
      num_experts: E.
    """
    flat = jnp.minimum(expert.reshape(-1), num_experts).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    rows = jnp.arange(len(flat), dtype=jnp.int32)
    row = jnp.zeros_like(flat).at[order].set(rows, unique_indices=True)
    counts = jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    starts = (jnp.cumsum(counts) - counts).astype(jnp.int32)
    return SortedAssignments(order, row.reshape(expert.shape), counts, starts)
