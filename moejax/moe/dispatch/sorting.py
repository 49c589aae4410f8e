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
    size = flat.size
    rows = jnp.arange(size, dtype=jnp.int32)
    if (num_experts + 1) * size <= 2**32:
        # Expert and position in one number: sorting one array is several times faster than an
        # argsort, which carries a second one, and distinct keys need no stability.
        packed = jnp.sort(flat.astype(jnp.uint32) * size + rows.astype(jnp.uint32))
        order = (packed % size).astype(jnp.int32)
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(flat).at[order].set(rows, unique_indices=True, mode="promise_in_bounds")
    counts = jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    starts = (jnp.cumsum(counts) - counts).astype(jnp.int32)
    return SortedAssignments(order, row.reshape(expert.shape), counts, starts)
