"""The FP8 recipe: tiles by hand, its bounds, and products beside the recipe in NumPy."""

import functools

import fp8_recipe as recipe
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.numerics import held_weights, quantize, quantized_matmul
from moejax.numerics.fp8 import by_column, by_row

jitted = jax.jit(quantize, static_argnums=1)


def test_two_tiles_by_hand():
    # Row 0 goes up to 448: scale 1. From 16 to 32 E4M3 has steps of 2, so that 17 is a tie between
    # 16 and 18, and 16 is even; 19 is one between 18 and 20, and 20 is even; 300 lies between 288
    # and 320. Below 2^-6 the steps are 2^-9: 2^-10 is half a step, and goes to 0.
    # Row 1 goes up to 44.8: scale 0.1, so that 1.7 is 17 in tenths, and 1.6 is left.
    x = np.zeros((2, 128), np.float32)
    x[0, :5] = [448, 17, 19, 300, 2.0**-10]
    x[1, :3] = [-44.8, 1.7, 1.9]
    got = np.asarray(jitted(x, (1, 128)))
    np.testing.assert_allclose(got[0, :5], [448, 16, 20, 288, 0], rtol=1e-6)
    np.testing.assert_allclose(got[1, :3], [-44.8, 1.6, 2.0], rtol=1e-6)
    assert not np.any(got[:, 5:])


def test_an_outlier_spoils_its_own_tile_only():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 256)).astype(np.float32)
    spoilt = x.copy()
    spoilt[1, 3] = 1e7
    before, after = (np.asarray(jitted(values, (1, 128))) for values in (x, spoilt))
    same = np.ones((4, 256), bool)
    same[1, :128] = False
    np.testing.assert_array_equal(before[same], after[same])
    # Beside 10^7 the smallest step is 10^7 / 448 / 512 = 44: nothing else is left.
    assert not np.any(np.delete(after[1, :128], 3))


def test_zeros_stay_zeros_and_nothing_is_divided_by_zero():
    for values in (np.zeros((2, 130)), np.full((2, 130), 1e-43)):
        assert np.all(np.asarray(jitted(values.astype(np.float32), (1, 128))) == 0)


def test_every_number_of_e4m3_passes_unchanged():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = codes[np.isfinite(codes)]
    assert len(numbers) == 254 and numbers.max() == 448
    # In one tile, which the largest of them sets a scale of 1 for, and in others by that scale.
    for scale in (1.0, 2.0**20, 3e-5):
        values = (numbers * scale).astype(np.float32)[None]
        np.testing.assert_allclose(jitted(values, (1, 256)), values, rtol=3e-7)


def test_ragged_tiles_and_matrices_of_many_axes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 200)) * 10.0 ** rng.uniform(-3, 3, (150, 1))
    for tile in ((1, 128), (128, 1), (128, 128)):
        got = jitted(x.astype(np.float32), tile)
        assert tiny.relative_error(got, recipe.hold(x.astype(np.float32), tile)) < 1e-6
    experts = rng.normal(size=(2, 150, 2, 130)).astype(np.float32)
    got = np.asarray(held_weights(jnp.asarray(experts), (1, 3)))
    for e, half in np.ndindex(2, 2):
        wanted = recipe.blocks(experts[e, :, half])
        assert tiny.relative_error(got[e, :, half], wanted) < 1e-6
    stacked = rng.normal(size=(3, 150, 5)).astype(np.float32)
    assert tiny.relative_error(by_column(stacked)[1], recipe.columns(stacked[1])) < 1e-6
    assert tiny.relative_error(by_row(stacked)[1], recipe.rows(stacked[1])) < 1e-6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=128),
    st.floats(2.0**-60, 2.0**20),
)
def test_the_error_is_bounded_by_the_number_and_by_the_tiles_largest(numbers, factor):
    x = np.zeros((1, 128), np.float32)
    x[0, : len(numbers)] = np.asarray(numbers) * factor * 1e-6
    got = np.asarray(jitted(x, (1, 128)), np.float64)
    largest = float(np.abs(x).max())
    if largest / 448 < 2.0**-126:  # XLA flushes what is below to zero
        return
    # Three bits after the first: half a step is at most 2^-4 of the number; below 2^-6 of the
    # scale it is 2^-10 of the scale, which is the largest over 448.
    bound = np.maximum(np.abs(x) * 2.0**-4, largest / 448 * 2.0**-10) * (1 + 1e-5)
    assert np.all(np.abs(got - x) <= bound)
    assert np.all(np.abs(got) <= largest * (1 + 1e-6))
    assert np.all((np.sign(got) == np.sign(x)) | (got == 0))


SHAPES = {"whole tiles": (2, 128, 256, 128), "ragged": (2, 150, 200, 130), "small": (1, 7, 5, 3)}


@functools.cache
def products(shape, dtype="float32"):
    """x, w and y's gradient, and y and both gradients of ``quantized_matmul``."""
    batch, tokens, inputs, outputs = SHAPES[shape]
    rng = np.random.default_rng(0)
    # Channels and tokens of very different size, so that tiles along the wrong axis show.
    uneven = lambda *size: rng.normal(size=size) * 10.0 ** rng.uniform(-2, 2, size)
    cast = lambda a: jnp.asarray(a, dtype)
    x, d_y = cast(uneven(batch, tokens, inputs)), cast(uneven(batch, tokens, outputs))
    w = jnp.asarray(uneven(inputs, outputs), jnp.float32)

    def run(x, w, d_y):
        y, pull_back = jax.vjp(quantized_matmul, x, w)
        return y, *pull_back(d_y)

    return (x, w, d_y), jax.jit(run)(x, w, d_y)


def by_sequence(x, w, d_y):
    """The recipe, sequence by sequence: tiles along tokens end with them."""
    found = [recipe.linear(one, w, d_one) for one, d_one in zip(x, d_y, strict=True)]
    y, d_x, d_w = zip(*found, strict=True)
    return np.stack(y), np.stack(d_x), np.sum(d_w, axis=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients_equal_the_recipe(shape):
    arguments, got = products(shape)
    wide = [np.asarray(a, np.float64) for a in arguments]
    exact = wide[0] @ wide[1]
    for a, b in zip(got, by_sequence(*wide), strict=True):
        assert tiny.relative_error(a, b) < 1e-5
    # Not the exact product, and not far from it.
    assert 1e-3 < tiny.relative_error(got[0], exact) < 0.1


def test_types_are_those_of_the_inputs():
    arguments, got = products("small", "bfloat16")
    for a, like in zip(got, (arguments[2], *arguments[:2]), strict=True):
        assert a.dtype == like.dtype
    wide = [np.asarray(a, np.float64) for a in arguments]
    for a, b in zip(got, by_sequence(*wide), strict=True):
        assert tiny.relative_error(a, b) < 4e-3


def test_casts_are_not_taken_away_by_the_compiler():
    lowered = jax.jit(functools.partial(quantize, tile=(1, 128))).lower(jnp.ones((2, 128)))
    program = lowered.compile().as_text()
    assert "f8e4m3fn[" in program
