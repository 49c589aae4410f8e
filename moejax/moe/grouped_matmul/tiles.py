"""Which rows of which group each program of a grouped product computes."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel cuts a product into programs: powers of two, at least 16 for tensor cores.

    Attributes:
      rows: rows of an output tile; of the weight gradient, rows of the weight matrix.
      columns: columns of an output tile.
      depth: terms summed in one step; of the weight gradient, rows of the group.
      warps: groups of 32 threads that compute a tile.
      stages: steps whose operands are in flight at once.
      width: row tiles whose programs run side by side, so that they share columns in the cache.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    width: int = 8


@struct.dataclass
class TileMap:
    """Row tiles of a product whose rows are sorted by group; empty where start = end.

    Attributes:
      group: group of each tile.
      start: first row of each tile.
      end: end of the tile's group; the tile's rows end there too.
    """

    group: Int[Array, " L"]
    start: Int[Array, " L"]
    end: Int[Array, " L"]


def tile_count(rows: int, num_groups: int, tile: int) -> int:
    """The most row tiles that ``rows`` sorted rows can need: ceil(M / tile) + E - 1.

    Each group but one can leave its last tile partly empty; and no tile is without a row.
    """
    return max(1, min(-(-rows // tile) + num_groups - 1, rows))


def map_tiles(group_sizes: Int[Array, " E"], rows: int, tile: int) -> TileMap:
    """Cuts each group into row tiles, which begin where the group begins.

    Args:
      group_sizes: rows of each group, in the order in which they stand; their sum is at most
        ``rows``, and what follows belongs to no group.
      rows: M, all rows there are.
      tile: rows of a tile.

    Returns:
      A map of ``tile_count`` entries, whatever the sizes; those that are not needed are empty.
    """
    num_groups = len(group_sizes)
    ends = jnp.cumsum(group_sizes)
    tile_ends = jnp.cumsum((group_sizes + tile - 1) // tile)
    ids = jnp.arange(tile_count(rows, num_groups, tile), dtype=jnp.int32)
    # One fused comparison; a binary search would be a loop of tiny kernels.
    group = jnp.searchsorted(tile_ends, ids, side="right", method="compare_all")
    group = jnp.minimum(group, num_groups - 1).astype(jnp.int32)
    sizes = group_sizes[group]
    first_tile = tile_ends[group] - (sizes + tile - 1) // tile
    end = ends[group].astype(jnp.int32)
    start = jnp.minimum(end - sizes + (ids - first_tile) * tile, end).astype(jnp.int32)
    return TileMap(group, start, end)
