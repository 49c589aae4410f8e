"""Which rows of a global batch a process needs, and their way onto its devices.

By the sharding itself: where the tensor axis reaches over processes, several of them need the same
rows, and a process's rows need not lie side by side.
"""

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped


class LocalRows:
    """The rows of global batches that this process's devices hold.

    Args:
      sharding: of an array (parts, rows of a part, S).
      parts: micro-batches of a batch.
      rows: B, rows of the global batch; ``parts`` divides it.
      seq_len: S, positions of a row.
    """

    def __init__(self, sharding: jax.sharding.Sharding, parts: int, rows: int, seq_len: int):
        self._sharding, self._shape = sharding, (parts, rows // parts, seq_len)
        needed = np.zeros(rows // parts, bool)
        for cuts in sharding.addressable_devices_indices_map(self._shape).values():
            needed[cuts[1]] = True
        self._of_part = np.flatnonzero(needed)

    @property
    def numbers(self) -> Int[np.ndarray, " n"]:
        """Numbers of the rows that this process reads, in the global batch, ascending."""
        parts, rows, _ = self._shape
        return (np.arange(parts)[:, None] * rows + self._of_part[None, :]).reshape(-1)

    def place(self, local: Shaped[np.ndarray, "n S"]) -> Shaped[Array, "parts rows S"]:
        """This process's rows as its part of the global array, each device its own."""
        if jax.process_count() == 1:
            return jax.device_put(local.reshape(self._shape), self._sharding)
        part = lambda cuts: self.part(local, cuts)
        return jax.make_array_from_callback(self._shape, self._sharding, part)

    def part(
        self, local: Shaped[np.ndarray, "n S"], cuts: tuple[slice, ...]
    ) -> Shaped[np.ndarray, "a b c"]:
        """What one of the devices holds: ``cuts`` of the global array, out of this process's."""
        own = local.reshape(self._shape[0], -1, self._shape[2])
        first, last, _ = cuts[1].indices(self._shape[1])
        start = int(np.searchsorted(self._of_part, first))
        return own[cuts[0], start : start + last - first, cuts[2]]
