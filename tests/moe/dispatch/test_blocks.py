"""The plan of the padded blocks: every assignment once, one expert a block, order kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.dispatch.blocks import default_block_size, plan_blocks

TOKENS, TOP_K, EXPERTS = 12, 2, 4
plan = jax.jit(plan_blocks, static_argnums=(1, 2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, EXPERTS), min_size=TOKENS * TOP_K, max_size=TOKENS * TOP_K),
    st.sampled_from([1, 4, 5, 32]),
)
def test_every_assignment_stands_in_one_row_of_a_block_of_its_expert(flat, block):
    expert = np.array(flat, np.int32).reshape(TOKENS, TOP_K)
    got = jax.device_get(plan(jnp.asarray(expert), EXPERTS, block))
    total, size = TOKENS * TOP_K, len(got.source)
    here = expert.reshape(-1) < EXPERTS
    rows = got.row.reshape(-1)
    # The two directions of the plan are inverses; foreign assignments have no row.
    np.testing.assert_array_equal(got.source[rows[here]], np.flatnonzero(here))
    assert np.all(rows[~here] == size)
    assert np.sum(got.source < total) == here.sum()
    # A row's block belongs to its assignment's expert, and only used blocks hold rows.
    filled = np.flatnonzero(got.source < total)
    np.testing.assert_array_equal(
        got.expert[filled // block], expert.reshape(-1)[got.source[filled]]
    )
    assert np.all(filled // block < got.used)
    # No block is wasted: each expert has as many as its rows fill.
    counts = np.bincount(expert.reshape(-1), minlength=EXPERTS + 1)[:EXPERTS]
    assert got.used == np.sum(-(-counts // block))
    # Inside an expert the order is that of the assignments.
    for e in range(EXPERTS):
        mine = rows[expert.reshape(-1) == e]
        assert np.all(np.diff(mine) > 0)


def test_plan_by_hand():
    # Assignments 0..5 go to experts 1, 0, 1, 1, foreign, 0; blocks of 2.
    # Expert 0 holds 1 and 5 (one block), expert 1 holds 0, 2 and 3 (two, one row empty).
    got = plan(jnp.array([[1, 0], [1, 1], [2, 0]]), 2, 2)
    np.testing.assert_array_equal(got.source[:6], [1, 5, 0, 2, 3, 6])
    np.testing.assert_array_equal(got.expert[:3], [0, 1, 1])
    assert int(got.used) == 3
    np.testing.assert_array_equal(got.row, [[2, 0], [3, 4], [len(got.source), 1]])


@pytest.mark.parametrize(
    ("assignments", "experts", "size"),
    # Half the fair share, down to a power of two, from 8 to 128.
    [(4096 * 2, 16, 128), (1024 * 2, 16, 64), (512 * 2, 20, 16), (8, 16, 8), (10**6, 8, 128)],
)
def test_default_block_size(assignments, experts, size):
    assert default_block_size(assignments, experts) == size


def test_the_number_of_blocks_suffices_for_the_worst_load():
    # Every expert one row over a whole number of blocks: ceil wastes block - 1 rows in each.
    shapes = functools.partial(jax.eval_shape, lambda e: plan_blocks(e, 4, 4))
    source = shapes(jax.ShapeDtypeStruct((20, 1), jnp.int32)).source
    # Loads 5, 5, 5, 5 need 2 blocks each.
    assert source.shape[0] >= 8 * 4
