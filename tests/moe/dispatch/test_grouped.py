"""The grouped dispatcher over many tiles, what it saves, and its program for CUDA.

Values and gradients over drawn loads are compared with NumPy in test_dispatch.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hopper import dense_products, kernel_flops, kernels, largest_tensor, lowered_for_h100

from moejax.config import ConfigError
from moejax.moe.dispatch import dense_loop, sort_assignments
from moejax.moe.dispatch.grouped import _forward, grouped
from moejax.moe.experts import ExpertWeights
from moejax.moe.grouped_matmul import Table, only

TOKENS, EXPERTS, TOP_K, WIDTH, HIDDEN = 60, 5, 2, 40, 24

# Several tiles an expert, of which none is filled to its last row and column.
SMALL_TILES = only("pallas", rows=16, columns=32, depth=16)


@functools.cache
def compiled(name):
    """Jitted: outputs, and the gradients of x, gate and the experts' weights."""
    dispatch = {
        "dense_loop": dense_loop,
        "grouped": functools.partial(grouped, interpret=True, table=SMALL_TILES),
    }[name]

    def run(x, expert, gate, weights, cotangent):
        call = lambda x, gate, weights: dispatch(x, expert, gate, weights)
        y, pull_back = jax.vjp(call, x, gate, weights)
        return y, pull_back(cotangent)

    return jax.jit(run)


@functools.cache
def inputs(dtype="float32"):
    """x, expert, gate, weights and a cotangent; the last ten tokens are nobody's."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, scale=1.0: jnp.asarray(scale * rng.normal(size=shape), dtype)
    weights = ExpertWeights(
        draw(EXPERTS, WIDTH, 2, HIDDEN, scale=WIDTH**-0.5),
        draw(EXPERTS, HIDDEN, WIDTH, scale=HIDDEN**-0.5),
    )
    gate = jnp.asarray(rng.uniform(0.1, 1.0, (TOKENS, TOP_K)), jnp.float32)
    # Expert 1 has none; index 5 is nobody's, and so is what a sum over devices may bring, above.
    expert = rng.choice([0, 2, 3, 4, EXPERTS, EXPERTS + 3], (TOKENS, TOP_K))
    expert[-10:] = EXPERTS
    expert = jnp.asarray(expert, jnp.int32)
    return draw(TOKENS, WIDTH), expert, gate, weights, draw(TOKENS, WIDTH)


def test_values_and_gradients_equal_the_reference():
    wanted = compiled("dense_loop")(*inputs())
    got = compiled("grouped")(*inputs())
    tiny.assert_trees_close(got, wanted, 1e-6)


def test_what_nobody_computes_may_hold_anything():
    x, expert, gate, weights, cotangent = inputs()
    nobody = jnp.all(expert >= EXPERTS, axis=1, keepdims=True)
    spoil = lambda rows: jnp.where(nobody, jnp.nan, rows)
    gates = jnp.where(expert >= EXPERTS, jnp.nan, gate)
    clean = compiled("grouped")(x, expert, gate, weights, cotangent)
    spoilt = compiled("grouped")(spoil(x), expert, gates, weights, spoil(cotangent))
    for a, b in zip(*map(jax.tree.leaves, (clean, spoilt)), strict=True):
        np.testing.assert_array_equal(a, b)
    y, (d_x, d_gate, d_weights) = spoilt
    assert int(jnp.sum(nobody)) >= 10
    assert not np.any(np.asarray(y)[nobody[:, 0]])
    assert not np.any(np.asarray(d_x)[nobody[:, 0]])
    assert not np.any(np.asarray(d_gate)[np.asarray(expert) >= EXPERTS])
    assert not any(np.any(np.asarray(leaf)[1]) for leaf in jax.tree.leaves(d_weights))


def test_bfloat16_in_bfloat16_out():
    x, expert, gate, weights, cotangent = inputs("bfloat16")
    got = compiled("grouped")(x, expert, gate, weights, cotangent)
    assert [leaf.dtype for leaf in jax.tree.leaves(got)] == [
        jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16
    ]  # fmt: skip
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights, cotangent))
    wanted = compiled("dense_loop")(wide[0], expert, gate, *wide[1:])
    # Each of a few roundings in a row is at most 2^-9.
    tiny.assert_trees_close(got, wanted, 0.01)


class Undefined:
    """Products whose first leaves what belongs to nobody as it finds it."""

    def forward(self, name, rows, weights, group_sizes, source=None):
        if name == "gate_up":
            return jnp.full((TOKENS * TOP_K, 2 * HIDDEN), jnp.nan)
        self.rows = rows
        return jnp.zeros((len(rows), WIDTH))


def test_undefined_rows_enter_no_other_product():
    x, expert, gate, weights, _ = inputs()
    plan, products = sort_assignments(expert, EXPERTS), Undefined()
    _forward(x, gate, weights, plan, products)
    used = int(jnp.sum(plan.counts))
    assert 0 < used < len(products.rows)
    assert not np.any(np.asarray(products.rows[used:]))


def shapes(tokens=1024, experts=16, top_k=4, width=256, hidden=128):
    narrow = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16)
    return (
        narrow(tokens, width),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
        ExpertWeights(narrow(experts, width, 2, hidden), narrow(experts, hidden, width)),
        narrow(tokens, width),
    )


def both_ways(x, expert, gate, weights, cotangent):
    call = lambda x, gate, weights: grouped(x, expert, gate, weights, table=Table())
    y, pull_back = jax.vjp(call, x, gate, weights)
    return y, pull_back(cotangent)


def test_forward_and_backward_lower_for_cuda_to_kernels_alone():
    program = lowered_for_h100(both_ways, *shapes())
    # Two products forward; two for the inputs, two for the weights and the activation backward.
    assert (kernels(program), dense_products(program)) == (7, 0)
    # The counts, and the inverse of the sort: nothing as wide as a token is added up by scatter.
    assert program.count('"stablehlo.scatter"(') == 2
    assert program.count('"stablehlo.sort"(') == 1
    # 4,096 assignments of 256 numbers; the weights have 16 · 256 · 256 as well.
    assert largest_tensor(program) == 1024 * 4 * 256


def test_the_program_is_no_larger_when_experts_are_many():
    # 64 experts of a quarter of the width: work and memory must not grow with their number.
    program = lowered_for_h100(both_ways, *shapes(experts=64, hidden=32))
    assert largest_tensor(program) == 1024 * 4 * 256


@pytest.mark.parametrize("experts, hidden", [(64, 1280), (128, 640)])
def test_the_kernels_run_the_useful_flops_and_a_few_empty_rows(experts, hidden):
    tokens, top_k, width = 16384, 4, 2560
    rows = tokens * top_k
    sizes = shapes(tokens, experts, top_k, width, hidden)
    useful = 3 * 2.0 * rows * 3 * width * hidden
    got = kernel_flops(both_ways, *sizes, rows=rows)
    # Row tiles hold 128 rows, and each expert but one may leave one partly empty.
    assert useful <= got <= useful * (1 + 128 * (experts - 1) / rows)


def test_the_forward_pass_saves_the_first_product_and_the_plan():
    x, expert, gate, weights, _ = shapes()

    def saved(x, expert, gate, weights):
        call = lambda x, gate, weights: grouped(x, expert, gate, weights, interpret=True)
        return jax.vjp(call, x, gate, weights)[1]

    rows = 1024 * 4
    sizes = [
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(saved, x, expert, gate, weights))
    ]
    plan = [(rows,), (1024, 4), (16,), (16,)]
    wanted = [x.shape, gate.shape, (rows, 256), *plan]
    wanted += [leaf.shape for leaf in jax.tree.leaves(weights)]
    assert sorted(sizes) == sorted(wanted)


def test_without_a_gpu_it_says_so():
    with pytest.raises(ConfigError, match=r"moe\.dispatch = 'grouped': no back end.*use 'blocks'"):
        jax.eval_shape(functools.partial(grouped, table=Table()), *shapes()[:4])
