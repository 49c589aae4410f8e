"""FP8 in every dispatcher, beside the recipe in NumPy: products low, gates and sums as they are.

Tiles along tokens are 128 rows of one expert in their order; the reference, which runs every expert
over every token, has tiles of 128 tokens, zeros where a token did not choose it.
"""

import functools

import fp8_recipe as recipe
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.moe.dispatch import blocks, dispatch
from moejax.moe.dispatch.blocks import BlockSize, block_sizes
from moejax.moe.dispatch.grouped import grouped
from moejax.moe.experts import ExpertWeights, held_experts

TOKENS, EXPERTS, TOP_K, WIDTH, HIDDEN = 300, 4, 2, 136, 130
SIZES = (BlockSize(256, 1), BlockSize(128, 2))

DISPATCHERS = {
    "dense_loop": functools.partial(dispatch, "dense_loop"),
    "capacity": lambda x, *args: dispatch("capacity", x, *args, slots=len(x)),
    "blocks": functools.partial(dispatch, "blocks"),
    "blocks of 256 and 128": functools.partial(blocks, sizes=SIZES),
    "grouped": functools.partial(grouped, interpret=True),
}
SLOW = ("blocks of 256 and 128", "grouped")


@functools.cache
def inputs(biased):
    """x, expert, gate, weights and a cotangent; rows and channels of very different size."""
    rng = np.random.default_rng(0)
    draw = lambda *size: rng.normal(size=size).astype(np.float32)
    uneven = lambda rows: draw(rows, WIDTH) * 10.0 ** rng.uniform(-1, 1, (rows, WIDTH))
    biases = (draw(EXPERTS, 2, HIDDEN), draw(EXPERTS, WIDTH)) if biased else (None, None)
    weights = ExpertWeights(
        draw(EXPERTS, WIDTH, 2, HIDDEN) * WIDTH**-0.5, draw(EXPERTS, HIDDEN, WIDTH), *biases,
        "clamped_swiglu" if biased else "swiglu",
    )  # fmt: skip
    # Expert 0 has most tokens, expert 3 none; some choices are nobody's.
    expert = np.stack([np.zeros(TOKENS), rng.choice([1, 2, EXPERTS], TOKENS)], 1).astype(np.int32)
    expert[::7, 0] = EXPERTS + 2
    gate = rng.uniform(0.1, 1, (TOKENS, TOP_K)).astype(np.float32)
    return uneven(TOKENS).astype(np.float32), expert, gate, weights, uneven(TOKENS)


@functools.cache
def compiled(name):
    def run(x, expert, gate, weights, cotangent):
        call = lambda x, gate, w: DISPATCHERS[name](x, expert, gate, held_experts(w))
        y, pull_back = jax.vjp(call, x, gate, weights)
        return y, pull_back(cotangent)

    return jax.jit(run)


def activation(name, g, u):
    """Hidden values, and their derivatives by gate and by up."""
    if name == "swiglu":
        s = 1 / (1 + np.exp(-g))
        return g * s * u, u * s * (1 + g * (1 - s)), g * s
    inside = g <= 7, np.abs(u) <= 7
    g, u = np.minimum(g, 7), np.clip(u, -7, 7)
    s = 1 / (1 + np.exp(-1.702 * g))
    return g * s * (u + 1), (u + 1) * s * (1 + 1.702 * g * (1 - s)) * inside[0], g * s * inside[1]


def numpy_layer(biased, all_rows):
    """The layer expert by expert; ``all_rows`` for tiles of tokens, zeros where not chosen."""
    x, expert, gate, weights, cotangent = inputs(biased)
    wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    x, gate, w, cotangent = wide((x, gate, weights, cotangent))
    y, d_x, d_gate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    d_w = jax.tree.map(np.zeros_like, w)
    for e in range(EXPERTS):
        mine = expert == e
        at = np.arange(TOKENS) if all_rows else np.flatnonzero(mine.any(axis=1))
        chosen = mine[at].any(axis=1)
        weight = np.sum(np.where(mine, gate, 0), axis=1)[at, None]
        rows, d_out = x[at], cotangent[at]
        held = [recipe.blocks(w.gate_up[e, :, half]) for half in range(2)]
        down = recipe.blocks(w.down[e])
        both = [recipe.rows(rows) @ matrix for matrix in held]
        if biased:
            both = [values + w.gate_up_bias[e, half] for half, values in enumerate(both)]
        hidden, by_gate, by_up = activation(weights.activation, *both)
        kept = recipe.rows(hidden * weight)
        y[at] += kept @ down
        d_hidden = recipe.rows(d_out) @ down.T
        d_both = [d_hidden * weight * slope for slope in (by_gate, by_up)]
        of_gate = np.sum(d_hidden * hidden, axis=1)
        d_w.down[e] = recipe.columns(kept).T @ recipe.columns(d_out)
        columns = recipe.columns(recipe.rows(rows)).T
        for half in range(2):
            d_w.gate_up[e, :, half] = columns @ recipe.columns(d_both[half])
            d_x[at] += recipe.rows(d_both[half]) @ held[half].T
        if biased:
            y[at] += weight * w.down_bias[e]
            of_gate += d_out @ w.down_bias[e]
            d_w.gate_up_bias[e] = np.stack([values.sum(axis=0) for values in d_both])
            d_w.down_bias[e] = np.sum(weight * d_out, axis=0)
        d_gate[at] += np.where(mine[at] & chosen[:, None], of_gate[:, None], 0)
    return y, (d_x, d_gate, d_w)


@pytest.mark.parametrize(
    ("name", "biased"),
    [(name, True) for name in DISPATCHERS if name not in SLOW]
    + [pytest.param(name, True, marks=pytest.mark.slow) for name in SLOW]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in DISPATCHERS],
)
def test_values_and_every_gradient_follow_the_recipe(name, biased):
    got = compiled(name)(*inputs(biased))
    wanted = numpy_layer(biased, all_rows=name == "dense_loop")
    # A number on the edge between two of FP8's may fall to either side: sums of float32 against
    # float64. One of them moves a tensor by some 2^-4 / sqrt(its numbers).
    tiny.assert_trees_close(got, wanted, 5e-4)


def test_the_recipe_is_near_what_is_not_quantised_and_not_the_same():
    x, expert, gate, weights, cotangent = jax.tree.map(jnp.asarray, inputs(True))
    run = lambda x, gate, weights: dispatch("blocks", x, expert, gate, weights)
    y, pull_back = jax.vjp(run, x, gate, weights)
    exact = y, pull_back(cotangent.astype(jnp.float32))
    got = compiled("blocks")(*inputs(True))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(exact), strict=True):
        name = jax.tree_util.keystr(path)
        # The last bias is no operand of a product.
        least = 0.0 if name.endswith("down_bias") else 1e-3
        assert least <= tiny.relative_error(a, b) < 0.1, name


def test_every_block_holds_whole_tiles():
    for experts in (8, 128, 4096):
        sizes = block_sizes(8192, experts, least=128)
        assert all(size.rows % 128 == 0 for size in sizes)
    assert [size.rows for size in block_sizes(8192, 8, least=128)] == [1024, 128]


@pytest.mark.parametrize("name", ["blocks", pytest.param("grouped", marks=pytest.mark.slow)])
def test_what_nobody_computes_may_hold_anything(name):
    x, expert, gate, weights, cotangent = inputs(True)
    nobody = expert >= EXPERTS
    spoil = lambda rows: np.where(nobody.all(axis=1, keepdims=True), np.nan, rows)
    assert nobody.all(axis=1).any()
    wanted = compiled(name)(x, expert, gate, weights, cotangent)
    got = compiled(name)(
        spoil(x), expert, np.where(nobody, np.nan, gate), weights, spoil(cotangent)
    )
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
