"""The tile map: every row of every group once, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_reference import slices
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax.moe.grouped_matmul.tiles import map_tiles, tile_count

ROWS, TILE, GROUPS = 40, 8, 4


@functools.cache
def mapped():
    return jax.jit(functools.partial(map_tiles, rows=ROWS, tile=TILE))


@st.composite
def sizes_of_groups(draw):
    """Cuts of at most all rows into groups, many of them empty."""
    cuts = draw(st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
    return np.diff([0, *sorted(cuts)])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes_of_groups())
@example(np.array([1, 1, 1, 37]))  # the most tiles that there can be
@example(np.array([0, 0, 0, 0]))
@example(np.array([0, 40, 0, 0]))
@example(np.array([8, 8, 16, 8]))
def test_tiles_cover_every_row_of_every_group_once(sizes):
    tiles = mapped()(jnp.asarray(sizes, jnp.int32))
    owner = np.full(ROWS, -1)
    for group, start, end in zip(
        *map(np.asarray, (tiles.group, tiles.start, tiles.end)), strict=True
    ):
        for row in range(start, min(start + TILE, end)):
            assert owner[row] == -1, "two tiles share a row"
            owner[row] = group
    wanted = np.full(ROWS, -1)
    for group, rows in enumerate(slices(sizes)):
        wanted[rows] = group
    np.testing.assert_array_equal(owner, wanted)


@pytest.mark.parametrize(
    ("rows", "groups", "tile", "count"),
    [
        (40, 4, 8, 8),  # 40 / 8 + 4 - 1
        (41, 4, 8, 9),  # 5.1, rounded up
        (65536, 64, 128, 575),
        (3, 64, 128, 3),  # no tile is without a row
        (0, 4, 8, 1),  # a grid is never empty
    ],
)
def test_the_number_of_tiles_depends_on_no_load(rows, groups, tile, count):
    assert tile_count(rows, groups, tile) == count
