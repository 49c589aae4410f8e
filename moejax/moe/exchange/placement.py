"""What the exchange has to know of the current mesh (``jax.set_mesh``)."""

import math

import jax
from jax.sharding import PartitionSpec

# Mesh axes that the rows of a batch are spread over, and the one that cuts every row's length.
BATCH_AXES = ("data", "fsdp", "expert")
CONTEXT_AXIS = "context"


def expert_devices() -> int:
    """Size of the mesh's ``expert`` axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["expert"]


def parts_of_batch(batch: int) -> int:
    """Parts that a batch of so many rows is cut into; 1 where it cannot be, or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return parts if batch % parts == 0 else 1


def parts_of_length(length: int) -> int:
    """Parts that rows of so many positions are cut into; 1 where they cannot be, or without a mesh.

    Rows that cannot be cut (one token of a text that is being written, the few of a row that a
    router takes) are whole on every device along ``context``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape.get(CONTEXT_AXIS, 1)
    return parts if length % parts == 0 else 1


def cut_of_tokens(batch: int, length: int) -> PartitionSpec:
    """How (B, S) tokens lie on the current mesh."""
    rows = BATCH_AXES if parts_of_batch(batch) > 1 else None
    return PartitionSpec(rows, CONTEXT_AXIS if parts_of_length(length) > 1 else None)


def slots_in_reach(kind: str, batch: int, length: int, slots: int) -> int:
    """The most tokens of a batch that an expert can get on one device.

    Args:
      kind: the exchange that runs.
      batch: rows of the batch.
      length: positions of a row.
      slots: the most tokens of a row that an expert takes.
    """
    return rows_in_reach(kind, batch) * min(slots, length // parts_of_length(length))


def rows_in_reach(kind: str, batch: int) -> int:
    """The most rows of a batch whose tokens one device can have to compute.

    Args:
      kind: the exchange that runs.
      batch: rows of the batch.
    """
    parts = parts_of_batch(batch)
    return batch // parts * (1 if parts == 1 or kind == "none" else expert_devices())
