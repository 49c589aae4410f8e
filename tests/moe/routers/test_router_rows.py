"""From tokens to the experts' rows and back, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.routers.rows import GatheredRows, MixedRows, ScaledRows, TokenRows

X = jnp.arange(12.0).reshape(2, 3, 2)  # two rows of three tokens


def test_tokens_stay_as_they_are():
    rows = TokenRows()
    assert rows.enter(X) is X and rows.leave(X, X) is X
    used = jnp.array([True, False, True, False, True, True])
    assert rows.reached(used, (2, 3)).tolist() == [[True, False, True], [False, True, True]]


def test_a_factor_on_the_input_only():
    rows = ScaledRows(jnp.array([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(rows.enter(X)[0], [[0, 1], [4, 6], [0, 0]])
    np.testing.assert_array_equal(rows.leave(X, X), X)
    assert rows.enter(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_picked_tokens_come_back_as_sums():
    # Of the first row tokens 2, 2 and 0, of the second 1, 0 and 0.
    rows = GatheredRows(jnp.array([[2, 2, 0], [1, 0, 0]]))
    entered = rows.enter(X)
    np.testing.assert_array_equal(entered[0], [[4, 5], [4, 5], [0, 1]])
    left = rows.leave(jnp.ones((2, 3, 2)), X)
    np.testing.assert_array_equal(left[..., 0], [[1, 0, 2], [2, 1, 0]])
    used = jnp.array([[True, False, False], [False, True, False]])
    assert rows.reached(used, (2, 3)).tolist() == [[False, False, True], [True, False, False]]


def test_picked_from_the_whole_batch_as_one_group():
    rows = GatheredRows(jnp.array([[5, 0]]))
    np.testing.assert_array_equal(rows.enter(X), [[[10, 11], [0, 1]]])
    left = rows.leave(jnp.ones((1, 2, 2)), X)
    np.testing.assert_array_equal(left[..., 0], [[1, 0, 0], [0, 0, 1]])


def test_mixed_rows_are_two_products():
    dispatch = jnp.array([[[1.0], [0.0], [0.5]], [[0.0], [1.0], [0.0]]])
    rows = MixedRows(dispatch, 2 * dispatch)
    np.testing.assert_array_equal(rows.enter(X), [[[2, 3.5]], [[8, 9]]])
    left = rows.leave(jnp.ones((2, 1, 2)), X)
    np.testing.assert_array_equal(left[..., 0], [[2, 0, 1], [0, 2, 0]])
    assert rows.reached(jnp.ones(2, bool), (2, 3)).tolist() == [
        [True, False, True],
        [False, True, False],
    ]


@pytest.mark.parametrize(
    "rows",
    [
        GatheredRows(jnp.array([[2, 2, 0], [1, 0, 0]])),
        MixedRows(jnp.full((2, 3, 4), 0.25), jnp.full((2, 3, 4), 0.5)),
    ],
)
def test_under_jit_with_gradients(rows):
    def through(x):
        return jnp.sum(rows.leave(jnp.sin(rows.enter(x)), x) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(through))(X)
    np.testing.assert_allclose(value, through(X), rtol=1e-5)
    moved = through(X + 1e-2) - through(X - 1e-2)
    np.testing.assert_allclose(2e-2 * gradient.sum(), moved, rtol=0.02)
