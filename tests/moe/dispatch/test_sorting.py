"""Sorting assignments by expert: a stable permutation and its inverse, nobody's rows last."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.dispatch import sort_assignments

TOKENS, TOP_K, EXPERTS = 12, 2, 4
sort = jax.jit(sort_assignments, static_argnums=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    # Index 4 and above is nobody here, 1,000 as well as 4.
    st.lists(
        st.sampled_from([0, 1, 2, 3, 4, 5, 1000]),
        min_size=TOKENS * TOP_K,
        max_size=TOKENS * TOP_K,
    )
)
def test_rows_are_the_assignments_in_the_stable_order_of_their_experts(flat):
    flat = np.array(flat, np.int32)
    got = jax.device_get(sort(jnp.asarray(flat.reshape(TOKENS, TOP_K)), EXPERTS))
    here = np.minimum(flat, EXPERTS)
    # NumPy's stable sort says it all: experts ascend, tokens ascend in them, nobody's come last.
    np.testing.assert_array_equal(got.order, np.argsort(here, kind="stable"))
    np.testing.assert_array_equal(got.order[got.row.reshape(-1)], np.arange(len(flat)))
    np.testing.assert_array_equal(got.counts, [np.sum(flat == e) for e in range(EXPERTS)])
    for e in range(EXPERTS):
        mine = got.order[got.starts[e] : got.starts[e] + got.counts[e]]
        assert np.all(flat[mine] == e) and np.all(np.diff(mine) > 0)
    assert np.all(flat[got.order[got.counts.sum() :]] >= EXPERTS)


def test_by_hand():
    # Assignments 0..5 go to experts 1, 0, nobody, 1, 0, 1.
    got = sort_assignments(jnp.array([[1, 0], [7, 1], [0, 1]]), 3)
    np.testing.assert_array_equal(got.order, [1, 4, 0, 3, 5, 2])
    np.testing.assert_array_equal(got.row, [[2, 0], [5, 3], [1, 4]])
    np.testing.assert_array_equal(got.counts, [2, 3, 0])
    np.testing.assert_array_equal(got.starts, [0, 2, 5])
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(got))
