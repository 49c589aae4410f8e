"""Rotary embedding: angles and scaled frequencies by hand, and what attention relies on.

Against Hugging Face's functions: tests/models/test_attention_parity.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.attention_config import RopeConfig
from moejax.models.rope import frequencies, rotate, yarn_range

turn = jax.jit(rotate, static_argnames="factor")


def plain(theta, width):
    return frequencies(theta, width, RopeConfig())


def test_pairs_turn_by_hand():
    # Width 4, theta 100: pairs (0, 2) and (1, 3) turn by position · 100^0 and position · 100^-1/2.
    # Position 2: angles 2 and 0.2. (1, 0) turns to (cos, sin); (0, 1) to (-sin, cos).
    x = jnp.array([[[[1.0, 0.0, 0.0, 1.0]]]])
    got = turn(x, jnp.array([[2]]), plain(100.0, 4))[0, 0, 0]
    np.testing.assert_allclose(got, [np.cos(2), -np.sin(0.2), np.sin(2), np.cos(0.2)], rtol=1e-6)


def test_only_the_first_channels_turn():
    # Two channels of six, position 1, frequency 1; a factor of 3 is on what turns only.
    x = jnp.array([[[[1.0, 0.0, 5.0, 6.0, 7.0, 8.0]]]])
    got = turn(x, jnp.array([[1]]), plain(100.0, 2), factor=3.0)[0, 0, 0]
    np.testing.assert_allclose(got, [3 * np.cos(1), 3 * np.sin(1), 5, 6, 7, 8], rtol=1e-6)


def test_position_zero_turns_nothing_and_norms_stay():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    frequency = plain(1e4, 8)
    np.testing.assert_array_equal(turn(x, jnp.zeros((1, 4), jnp.int32), frequency), x)
    turned = turn(x, jnp.array([[0, 7, 100, 5000]]), frequency)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    frequency = plain(1e4, 8)
    at = lambda x, position: np.asarray(turn(x, jnp.array([[position]]), frequency)).reshape(-1)
    np.testing.assert_allclose(at(query, 9) @ at(key, 4), at(query, 105) @ at(key, 100), rtol=1e-4)


def test_narrow_types_come_back_narrow():
    x = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    turned = jax.eval_shape(lambda x, p: rotate(x, p, plain(1e4, 8)), x, positions)
    assert turned.dtype == jnp.bfloat16 and turned.shape == x.shape


def test_linear_divides_every_frequency():
    # 100^0 / 4 and 100^(-1/2) / 4.
    got = frequencies(100.0, 4, RopeConfig(scaling="linear", factor=4.0))
    np.testing.assert_allclose(got, [0.25, 0.025], rtol=1e-6)


def test_llama3_by_hand():
    # Theta 10^4, width 8: frequencies 1, 0.1, 0.01, 0.001. In a context of 200 pi positions they
    # make 100, 10, 1 and 0.1 turns. Low 4 and high 16: the first stays, the last two are divided
    # by 8, and the second lies half way: 0.1 · (0.5 + 0.5 / 8).
    rope = RopeConfig(
        scaling="llama3", factor=8.0, original_length=628,
        low_frequency_factor=4.0, high_frequency_factor=16.0,
    )  # fmt: skip
    got = frequencies(1e4, 8, rope)
    np.testing.assert_allclose(got, [1.0, 0.1 * 0.5625, 0.01 / 8, 0.001 / 8], rtol=1e-3)


def test_yarn_by_hand():
    # The pair that makes t turns in length positions is width · ln(length / (2 pi t)) / (2 ln
    # theta). Theta 10^4, width 64, length 4096, DeepSeek's: 32 turns at pair 10.47, one at 22.51;
    # rounded outwards 10 and 23. Below 10 pairs stay, from 23 they are divided by 40; pair 12 is
    # 2/13 of the way.
    rope = RopeConfig(scaling="yarn", factor=40.0, original_length=4096)
    assert yarn_range(1e4, 64, rope) == (10, 23)
    exact = yarn_range(1e4, 64, dataclasses.replace(rope, truncate=False))
    np.testing.assert_allclose(exact, [10.47, 22.51], atol=0.01)
    ratio = frequencies(1e4, 64, rope) / plain(1e4, 64)
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-6)
    np.testing.assert_allclose(ratio[12], 11 / 13 + 2 / 13 / 40, rtol=1e-6)


# FACTS: m = 0.0707 ln 40 + 1 = 1.2608 for DeepSeek-V2, 0.1 ln 40 + 1 = 1.3689 for V3; their
# softmax scale has m squared, and cosine and sine are as they were.
@pytest.mark.parametrize(("mscale", "m"), [(0.707, 1.2608), (1.0, 1.3689)])
def test_deepseeks_factor_is_on_the_softmax(mscale, m):
    rope = RopeConfig(
        scaling="yarn", factor=40.0, original_length=4096, mscale=mscale, mscale_all_dim=mscale
    )
    assert rope.softmax_factor == pytest.approx(m**2, abs=2e-4)
    assert rope.cos_sin_factor == 1.0


def test_the_papers_factor_is_on_cosine_and_sine():
    # YaRN's own: sqrt(1/t) = 0.1 ln s + 1 on queries and keys (arXiv 2309.00071, eq. 15).
    rope = RopeConfig(scaling="yarn", factor=32.0, original_length=4096)
    assert rope.cos_sin_factor == pytest.approx(0.1 * math.log(32) + 1)
    assert rope.softmax_factor == 1.0
    given = RopeConfig(scaling="yarn", factor=32.0, original_length=4096, attention_factor=1.5)
    assert given.cos_sin_factor == 1.5
