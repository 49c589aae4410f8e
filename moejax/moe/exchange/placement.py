"""What the exchange has to know of the current mesh (``jax.set_mesh``)."""

import math

import jax

# Mesh axes that the rows of a batch are spread over.
BATCH_AXES = ("data", "fsdp", "expert")


def expert_devices() -> int:
    """Size of the mesh's ``expert`` axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["expert"]


def parts_of_batch(batch: int) -> int:
    """Parts that a batch of so many rows is cut into; 1 where it cannot be, or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return parts if batch % parts == 0 else 1


def rows_in_reach(kind: str, batch: int) -> int:
    """The most rows of a batch whose tokens one device can have to compute.

    Args:
      kind: the exchange that runs.
      batch: rows of the batch.
    """
    parts = parts_of_batch(batch)
    return batch // parts * (1 if parts == 1 or kind == "none" else expert_devices())
