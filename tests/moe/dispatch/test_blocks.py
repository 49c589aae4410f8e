"""The plan of the blocks: every assignment once, one expert a block, sizes and order kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.dispatch.blocks import BlockSize, block_sizes, blocks, plan_blocks
from moejax.moe.experts import ExpertWeights

TOKENS, TOP_K, EXPERTS = 12, 2, 4
SIZES = {
    "one size": (BlockSize(4, 1),),
    "single rows": (BlockSize(1, 3),),
    "larger than everything": (BlockSize(32, 2),),
    "two sizes": (BlockSize(4, 1), BlockSize(2, 4)),
    "three sizes": (BlockSize(8, 2), BlockSize(4, 1), BlockSize(1, 2)),
}
plan = jax.jit(plan_blocks, static_argnums=(1, 2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, EXPERTS), min_size=TOKENS * TOP_K, max_size=TOKENS * TOP_K),
    st.sampled_from(list(SIZES)),
)
def test_every_assignment_stands_in_one_row_of_a_block_of_its_expert(flat, name):
    sizes, flat = SIZES[name], np.array(flat, np.int32)
    got = jax.device_get(plan(jnp.asarray(flat.reshape(TOKENS, TOP_K)), EXPERTS, sizes))
    here = flat < EXPERTS
    rows = got.row.reshape(-1)
    # The two directions of the plan are inverses; foreign assignments have no row.
    np.testing.assert_array_equal(got.source[rows[here]], np.flatnonzero(here))
    assert np.all(rows[~here] == len(got.source))
    assert np.sum(got.source < len(flat)) == here.sum()
    # Sizes stand one after another; a row's block belongs to its assignment's expert.
    end, covered = 0, np.full(len(got.source), -1)
    for (size, _), group in zip(sizes, got.blocks, strict=True):
        assert group.start == end
        assert group.used <= len(group.expert)
        end = group.start + group.used * size
        covered[group.start : end] = np.repeat(group.expert[: group.used], size)
    np.testing.assert_array_equal(covered[rows[here]], flat[here])
    # A step may reach beyond the blocks, but never beyond the rows.
    assert end + max(size * step for size, step in sizes) <= len(got.source)
    for e in range(EXPERTS):
        # Large blocks are full, no small one is wasted, and the order is that of the assignments.
        mine, left = rows[flat == e], np.sum(flat == e)
        assert np.all(np.diff(mine[: left // sizes[0].rows * sizes[0].rows]) > 0)
        for n, ((size, _), group) in enumerate(zip(sizes, got.blocks, strict=True)):
            wanted = -(-left // size) if n == len(sizes) - 1 else left // size
            assert np.sum(group.expert[: group.used] == e) == wanted
            left -= min(left, wanted * size)


def test_plan_by_hand():
    # Assignments 0..7 go to experts 1, 0, 1, 1, foreign, 0, 1, 1; blocks of 2, then of 1.
    # Expert 0 holds 1 and 5: one block of 2. Expert 1 holds 0, 2, 3, 6 and 7: two of 2, one of 1.
    expert = jnp.array([[1, 0], [1, 1], [2, 0], [1, 1]])
    got = plan(expert, 2, (BlockSize(2, 1), BlockSize(1, 1)))
    large, small = got.blocks
    np.testing.assert_array_equal(large.expert[:3], [0, 1, 1])
    assert (int(large.used), int(large.start)) == (3, 0)
    assert int(small.expert[0]) == 1
    assert (int(small.used), int(small.start)) == (1, 6)
    np.testing.assert_array_equal(got.source[:7], [1, 5, 0, 2, 3, 6, 7])
    np.testing.assert_array_equal(got.row, [[2, 0], [3, 4], [len(got.source), 1], [5, 6]])


@pytest.mark.parametrize(
    ("assignments", "experts", "sizes"),
    [
        (8192 * 4, 8, [(1024, 1), (128, 4)]),  # fair share 4,096
        (8192 * 4, 32, [(1024, 1), (128, 4)]),
        (8192 * 4, 128, [(256, 2), (128, 4)]),
        (512 * 2, 20, [(32, 16), (16, 32)]),  # fair share 51
        (8, 16, [(8, 1)]),
    ],
)
def test_sizes_follow_the_fair_share(assignments, experts, sizes):
    assert [tuple(size) for size in block_sizes(assignments, experts)] == sizes


def test_work_follows_the_rows_and_not_their_spread():
    """The loops' trip counts: what one expert gets costs as much as what all of them share."""
    expert = jnp.asarray(np.arange(64).reshape(32, 2) % 8)
    sizes = (BlockSize(8, 1), BlockSize(2, 1))
    steps = lambda expert: [int(group.used) for group in plan(expert, 8, sizes).blocks]
    assert steps(expert) == [8, 0]
    assert steps(expert * 0 + 5) == [8, 0]
    # The first 8 assignments are foreign, so each expert has 7: four small blocks.
    foreign = jnp.arange(64).reshape(32, 2) < 8
    assert steps(jnp.where(foreign, 8, expert)) == [0, 8 * 4]


def test_an_empty_row_reads_no_token():
    """Rows that pad a block hold zeros, so that a NaN elsewhere cannot reach an expert."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32).at[3].set(jnp.nan)
    weights = ExpertWeights(jnp.ones((2, 3, 2, 5)), jnp.ones((2, 5, 3)))
    expert = jnp.array([[0], [1], [0], [2]])

    def run(x, weights):
        return blocks(x, expert, jnp.ones((4, 1)), weights, sizes=(BlockSize(4, 2),))

    y, pullback = jax.vjp(run, x, weights)
    d_x, d_weights = pullback(y)
    for leaf in (y, d_x, *jax.tree.leaves(d_weights)):
        assert np.all(np.isfinite(np.asarray(leaf)))
