"""Operands of the dispatchers' products as a precision holds them."""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch.sorting import SortedAssignments
from moejax.moe.grouped_matmul.tiles import map_tiles
from moejax.numerics import Precision
from moejax.numerics.fp8 import TILE, by_column, by_row


class Held(NamedTuple):
    """What a precision makes of operands: nothing, or what FP8 holds of them.

    See ``moejax.numerics.fp8``. In FP8 the tiles along tokens are 128 rows of one expert.
    """

    precision: Precision

    def rows(self, values: Float[Array, "r W"], parts: int = 1) -> Float[Array, "r W"]:
        """Operands of products along their channels, of which each of ``parts`` has its tiles."""
        if self.precision == "native":
            return values
        return by_row(values.reshape(len(values), parts, -1)).reshape(values.shape)

    def blocks(self, values: Float[Array, "r W"], count: int) -> Float[Array, "r W"]:
        """Operands of products along the rows of each of ``count`` blocks."""
        if self.precision == "native":
            return values
        return by_column(values.reshape(count, -1, values.shape[-1])).reshape(values.shape)

    def sorted(
        self, values: Float[Array, "R W"], plan: SortedAssignments, source: Int[Array, " M"] | None
    ) -> tuple[Float[Array, "M W"], Int[Array, " M"] | None]:
        """Operands of products along the sorted rows of each expert.

        Args:
          values: sorted rows, or with ``source`` rows anywhere; what is nobody's may be anything.
          plan: where they stand.
          source: which of ``values`` stands in each sorted row.

        Returns:
          The operands and their source: in FP8 they are sorted, and have none.
        """
        if self.precision == "native":
            return values, source
        size = len(values) if source is None else len(source)
        tiles = map_tiles(plan.counts, size, TILE)
        at = tiles.start[:, None] + jnp.arange(TILE, dtype=jnp.int32)[None, :]
        there = at < tiles.end[:, None]
        row = jnp.minimum(at, size - 1)
        row = row if source is None else source[row]
        kept = by_column(jnp.where(there[..., None], values[row], 0))
        place = jnp.where(there, at, size).reshape(-1)
        empty = jnp.zeros((size, values.shape[-1]), kept.dtype)
        kept = kept.reshape(len(place), -1)
        return empty.at[place].set(kept, mode="drop"), None

    def exactly(self) -> contextlib.AbstractContextManager:
        """Products of what FP8 holds are products of float32, in full."""
        if self.precision == "native":
            return contextlib.nullcontext()
        return jax.default_matmul_precision("highest")
