"""The own kernels, interpreted, against NumPy in float64; and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from grouped_reference import by_rows, by_weights
from hopper import dense_products, kernels, lowered_for_h100
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.grouped_matmul.pallas_kernels import rows_by_rows, rows_by_weights
from moejax.moe.grouped_matmul.tiles import Tiles

# Neither side of a matrix is a multiple of a tile, nor are the rows.
TOKENS, ROWS, GROUPS, INPUTS, OUTPUTS = 30, 70, 4, 40, 24
TILES = Tiles(rows=16, columns=32, depth=16, width=2)


@functools.cache
def inputs(dtype="float32"):
    """Tokens, rows, gradients of rows, weights, and the token of each row."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    token = jnp.asarray(rng.integers(0, TOKENS, ROWS), jnp.int32)
    tokens, rows = draw(TOKENS, INPUTS), draw(ROWS, INPUTS)
    return tokens, rows, draw(ROWS, OUTPUTS), draw(GROUPS, INPUTS, OUTPUTS), token


def spoil(rows, sizes):
    """Rows of no group hold NaN."""
    return jnp.where(jnp.arange(len(rows))[:, None] < sum(sizes), rows, jnp.nan)


@functools.cache
def forward(gathered, transposed=False):
    def run(rows, weights, sizes, token):
        source = token if gathered else None
        return rows_by_weights(
            rows, weights, sizes, source, TILES, transposed=transposed, interpret=True
        )

    return jax.jit(run)


@functools.cache
def outer(left, right, dtype):
    def run(first, second, sizes, token):
        sources = (token if left else None, token if right else None)
        return rows_by_rows(
            first, second, sizes, *sources, TILES, dtype=jnp.dtype(dtype), interpret=True
        )

    return jax.jit(run)


def check_forward(sizes, dtype="float32", tolerance=1e-6):
    _, rows, _, weights, token = inputs(dtype)
    out = forward(False)(spoil(rows, sizes), weights, jnp.asarray(sizes, jnp.int32), token)
    assert out.dtype == dtype
    used = sum(sizes)
    # Interpreted outputs begin as NaN. On a GPU, where programs run at once, what a tile writes
    # beyond its group would be another program's.
    assert np.all(np.isnan(np.asarray(out[used:], np.float32)))
    if used:
        assert tiny.relative_error(out[:used], by_weights(rows, weights, sizes)) < tolerance


def check_weight_gradient(sizes, dtype="float32", tolerance=1e-6):
    _, rows, gradients, _, token = inputs(dtype)
    first, second = spoil(rows, sizes), spoil(gradients, sizes)
    out = outer(False, False, dtype)(first, second, jnp.asarray(sizes, jnp.int32), token)
    assert out.dtype == dtype
    wanted = by_rows(rows, gradients, sizes)
    for got, expected, size in zip(out, wanted, sizes, strict=True):
        assert tiny.relative_error(got, expected) < tolerance
        assert size or not np.any(np.asarray(got)), "an empty group's gradient is zero"


SIZES = {
    "uneven, with rows of nobody": (13, 1, 33, 20),
    "empty groups first, between and last": (0, 37, 0, 0),
    "all rows to one group": (0, 0, 70, 0),
    "whole tiles": (16, 32, 16, 0),
    "one row": (0, 0, 0, 1),
    "no row at all": (0, 0, 0, 0),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_products_of_every_kind_of_group(sizes):
    check_forward(sizes)
    check_weight_gradient(sizes)


@st.composite
def drawn_sizes(draw):
    cuts = draw(st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
    return tuple(int(size) for size in np.diff([0, *sorted(cuts)]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn_sizes())
def test_products_of_drawn_groups(sizes):
    check_forward(sizes)
    check_weight_gradient(sizes)


def test_bfloat16_in_float32_sums():
    sizes = SIZES["uneven, with rows of nobody"]
    # bfloat16 results round by up to 2^-9; sums of 40 and more terms in it would be far worse.
    check_forward(sizes, "bfloat16", 3e-3)
    check_weight_gradient(sizes, "bfloat16", 3e-3)


def test_a_weight_gradient_may_be_wider_than_its_operands():
    sizes = SIZES["all rows to one group"]
    _, rows, gradients, _, token = inputs("bfloat16")
    run = outer(False, False, "float32")
    out = run(rows, gradients, jnp.asarray(sizes, jnp.int32), token)
    assert out.dtype == jnp.float32
    assert tiny.relative_error(out, by_rows(rows, gradients, sizes)) < 1e-6


def test_rows_are_read_through_an_index():
    sizes = SIZES["uneven, with rows of nobody"]
    tokens, _, gradients, weights, token = inputs()
    counts, used = jnp.asarray(sizes, jnp.int32), sum(sizes)
    rows = np.asarray(tokens)[np.asarray(token)]
    out = forward(True)(tokens, weights, counts, token)
    assert tiny.relative_error(out[:used], by_weights(rows, weights, sizes)) < 1e-6
    out = outer(True, False, "float32")(tokens, gradients, counts, token)
    assert tiny.relative_error(out, by_rows(rows, gradients, sizes)) < 1e-6
    out = outer(False, True, "float32")(gradients, tokens, counts, token)
    assert tiny.relative_error(out, by_rows(gradients, rows, sizes)) < 1e-6


def test_weights_are_transposed_where_they_stand():
    sizes = SIZES["uneven, with rows of nobody"]
    _, _, gradients, weights, token = inputs()
    run = forward(False, transposed=True)
    out = run(spoil(gradients, sizes), weights, jnp.asarray(sizes, jnp.int32), token)
    wanted = by_weights(gradients, np.swapaxes(weights, 1, 2), sizes)
    assert tiny.relative_error(out[: sum(sizes)], wanted) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["forward", "transposed", "outer"])
def test_kernels_lower_for_cuda(kind, dtype):
    shape = lambda *size: jax.ShapeDtypeStruct(size, dtype)
    index = lambda size: jax.ShapeDtypeStruct((size,), jnp.int32)
    tiles = Tiles(128, 128, 64, 4, 3) if dtype == "bfloat16" else Tiles(64, 64, 32, 4, 3)
    width, other = (200, 136) if kind == "transposed" else (136, 200)

    def by_matrix(tokens, weights, sizes, token):
        return rows_by_weights(
            tokens, weights, sizes, token, tiles, transposed=kind == "transposed", interpret=False
        )

    def by_group(left, right, sizes, token):
        return rows_by_rows(
            left, right, sizes, token, None, tiles, dtype=left.dtype, interpret=False
        )

    if kind == "outer":
        program = lowered_for_h100(by_group, shape(300, 136), shape(900, 200), index(8), index(900))
    else:
        weights = shape(8, 136, 200)
        program = lowered_for_h100(by_matrix, shape(300, width), weights, index(8), index(900))
        assert f"tensor<900x{other}x" in program
    assert (kernels(program), dense_products(program)) == (1, 0)
    # Tokens are read where they are: nothing of the width of a row is gathered outside.
    assert f"tensor<900x{width}x" not in program
