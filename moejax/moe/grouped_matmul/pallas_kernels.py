"""Grouped products as Triton kernels written in Pallas: what needs nothing but jax.

Rows are sorted by group. Row tiles begin where their group begins, so that no program works for
two groups; the last tile of a group masks what is not the group's. Products accumulate in FP32;
FP32 operands are multiplied in full FP32. An operand may be read through an index (``source``),
which gathers tokens inside the kernel instead of writing their copies to memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from moejax.moe.grouped_matmul.tiles import Tiles, map_tiles, tile_count


def rows_by_weights(
    rows: Float[Array, "R A"],
    weights: Float[Array, "E P Q"],
    group_sizes: Int[Array, " E"],
    source: Int[Array, " M"] | None,
    tiles: Tiles,
    *,
    transposed: bool,
    interpret: bool,
) -> Float[Array, "M B"]:
    """Each group's rows times its own matrix, or its transpose.

    Args:
      rows: operands, sorted by group; with ``source``, in any order.
      weights: a matrix a group, (A, B), or (B, A) where it is transposed.
      group_sizes: rows of each group; rows beyond their sum come out undefined.
      source: which of ``rows`` stands in each sorted row; None where ``rows`` are sorted.
      tiles: the cut.
      transposed: multiplies by the transposes.
      interpret: runs on any platform, slowly.

    Returns:
      The products, in the type of ``rows``.
    """
    size = len(rows) if source is None else len(source)
    out = weights.shape[1] if transposed else weights.shape[2]
    tile_map = map_tiles(group_sizes, size, tiles.rows)
    programs = tile_count(size, len(group_sizes), tiles.rows) * pl.cdiv(out, tiles.columns)
    indices = () if source is None else (source,)
    kernel = functools.partial(_rows_kernel, tiles=tiles, transposed=transposed)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((size, out), rows.dtype),
        grid=(programs,),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
    )(*jax.tree.leaves(tile_map), rows, weights, *indices)


def rows_by_rows(
    left: Float[Array, "R A"],
    right: Float[Array, "S B"],
    group_sizes: Int[Array, " E"],
    left_source: Int[Array, " M"] | None,
    right_source: Int[Array, " M"] | None,
    tiles: Tiles,
    *,
    dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "E A B"]:
    """For each group, the sum over its rows of the outer products: leftᵀ · right.

    Args:
      left: rows, sorted by group; with ``left_source``, in any order.
      right: rows as well.
      group_sizes: rows of each group; rows beyond their sum count for nothing.
      left_source: which of ``left`` stands in each sorted row; None where they are sorted.
      right_source: likewise.
      tiles: the cut.
      dtype: of the result; the sum itself is FP32.
      interpret: runs on any platform, slowly.

    Returns:
      A matrix a group; zeros for an empty one.
    """
    num_groups, height, width = len(group_sizes), left.shape[1], right.shape[1]
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    starts = ends - group_sizes.astype(jnp.int32)
    programs = num_groups * pl.cdiv(height, tiles.rows) * pl.cdiv(width, tiles.columns)
    indices = [source for source in (left_source, right_source) if source is not None]
    kernel = functools.partial(
        _outer_kernel,
        tiles=tiles,
        gathered=(left_source is not None, right_source is not None),
    )
    # An index and the rows it names are loaded one stage after the other: as many rows are in
    # flight with twice the stages less one.
    stages = 2 * tiles.stages - 1 if indices else tiles.stages
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_groups, height, width), dtype),
        grid=(programs,),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=stages),
        interpret=interpret,
    )(starts, ends, left, right, *indices)


def _place(program, row_tiles: int, column_tiles: int, width: int):
    """Row tile and column tile of a program: ``width`` row tiles at a time, column by column."""
    band = program // (width * column_tiles)
    inside = program % (width * column_tiles)
    height = jnp.minimum(row_tiles - band * width, width)
    return band * width + inside % height, inside // height


def _load(ref, top, rows, first, columns, *, here=None, source=None, group=None):
    """A tile of a matrix, zero past the last column and where ``here`` (a row each) is False.

    Rows stand from ``top`` on, or, with ``source``, where it says; with ``group``, in the matrix
    of that group.
    """
    limit = ref.shape[-1]
    mask = None if here is None else here[:, None]
    if limit % columns:
        inside = (first + jnp.arange(columns) < limit)[None, :]
        mask = inside if mask is None else mask & inside
    if source is None:
        index = (pl.ds(top, rows), pl.ds(first, columns))
    else:
        # Slices and indices do not mix, so that both axes are indices here.
        column = first + jnp.arange(columns)
        index = jnp.broadcast_arrays(source[:, None], column[None, :])
    # Triton takes a single indexer: the group goes into it.
    tile = ref.at[tuple(index) if group is None else (group, *index)]
    if mask is None:
        return triton.load(tile)
    return triton.load(tile, mask=jnp.broadcast_to(mask, (rows, columns)), other=0.0)


def _dot(a, b, **transposed):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision, **transposed)


def _rows_kernel(group_ref, start_ref, end_ref, rows_ref, weights_ref, *refs, tiles, transposed):
    *source_ref, out_ref = refs
    depth = rows_ref.shape[1]
    width = out_ref.shape[1]
    tile, column = _place(
        pl.program_id(0), len(start_ref), pl.cdiv(width, tiles.columns), tiles.width
    )
    start, end = triton.load(start_ref.at[tile]), triton.load(end_ref.at[tile])

    @pl.when(start < end)
    def _():
        group = triton.load(group_ref.at[tile])
        here = start + jnp.arange(tiles.rows) < end
        first = column * tiles.columns
        source = None
        if source_ref:
            source = triton.load(source_ref[0].at[pl.ds(start, tiles.rows)], mask=here, other=0)

        def step(i, total):
            at = i * tiles.depth
            a = _load(rows_ref, start, tiles.rows, at, tiles.depth, here=here, source=source)
            sides = (at, tiles.depth), (first, tiles.columns)
            (top, height), (left, wide) = reversed(sides) if transposed else sides
            inside = _below(top, height, weights_ref.shape[1])
            b = _load(weights_ref, top, height, left, wide, here=inside, group=group)
            return total + _dot(a, b, trans_b=transposed)

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(depth, tiles.depth), step, zeros)
        mask = here[:, None] & (first + jnp.arange(tiles.columns) < width)[None, :]
        place = out_ref.at[pl.ds(start, tiles.rows), pl.ds(first, tiles.columns)]
        triton.store(place, total.astype(out_ref.dtype), mask=mask)


def _below(first, size: int, limit: int):
    """Which of ``size`` indices from ``first`` on lie below the limit; None where all must."""
    return None if limit % size == 0 else first + jnp.arange(size) < limit


def _outer_kernel(starts_ref, ends_ref, left_ref, right_ref, *refs, tiles, gathered):
    *source_refs, out_ref = refs
    left_source = source_refs.pop(0) if gathered[0] else None
    right_source = source_refs.pop(0) if gathered[1] else None
    _, height, width = out_ref.shape
    tall, wide = pl.cdiv(height, tiles.rows), pl.cdiv(width, tiles.columns)
    group = pl.program_id(0) // (tall * wide)
    tile, column = _place(pl.program_id(0) % (tall * wide), tall, wide, tiles.width)
    start, end = triton.load(starts_ref.at[group]), triton.load(ends_ref.at[group])
    top, first = tile * tiles.rows, column * tiles.columns

    def step(i, total):
        at = start + i * tiles.depth
        here = at + jnp.arange(tiles.depth) < end

        def rows(ref, source_ref, first, columns):
            source = None
            if source_ref is not None:
                source = triton.load(source_ref.at[pl.ds(at, tiles.depth)], mask=here, other=0)
            return _load(ref, at, tiles.depth, first, columns, here=here, source=source)

        a = rows(left_ref, left_source, top, tiles.rows)
        b = rows(right_ref, right_source, first, tiles.columns)
        return total + _dot(a, b, trans_a=True)

    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(end - start, tiles.depth), step, zeros)
    mask = (top + jnp.arange(tiles.rows) < height)[:, None] & (
        first + jnp.arange(tiles.columns) < width
    )[None, :]
    place = out_ref.at[group, pl.ds(top, tiles.rows), pl.ds(first, tiles.columns)]
    triton.store(place, total.astype(out_ref.dtype), mask=mask)
