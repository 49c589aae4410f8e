"""Rotary embedding: angles by hand, and the properties that attention relies on."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models.rope import rotate

turn = jax.jit(rotate)


def test_pairs_turn_by_hand():
    # Width 4, theta 100: pairs (0, 2) and (1, 3) turn by position · 100^0 and position · 100^-1/2.
    # Position 2: angles 2 and 0.2. (1, 0) turns to (cos, sin); (0, 1) to (-sin, cos).
    x = jnp.array([[[[1.0, 0.0, 0.0, 1.0]]]])
    got = turn(x, jnp.array([[2]]), 100.0)[0, 0, 0]
    np.testing.assert_allclose(got, [np.cos(2), -np.sin(0.2), np.sin(2), np.cos(0.2)], rtol=1e-6)


def test_position_zero_turns_nothing_and_norms_stay():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    np.testing.assert_array_equal(turn(x, jnp.zeros((1, 4), jnp.int32), 1e4), x)
    turned = turn(x, jnp.array([[0, 7, 100, 5000]]), 1e4)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda x, position: np.asarray(turn(x, jnp.array([[position]]), 1e4)).reshape(-1)
    np.testing.assert_allclose(at(query, 9) @ at(key, 4), at(query, 105) @ at(key, 100), rtol=1e-4)


def test_narrow_types_come_back_narrow():
    x = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    assert jax.eval_shape(lambda x, p: rotate(x, p, 1e4), x, positions).dtype == jnp.bfloat16
