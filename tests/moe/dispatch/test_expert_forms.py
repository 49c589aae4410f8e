"""Experts with biases and gpt-oss's activation: every dispatcher against NumPy, and Transformers.

That devices agree on them is in tests/moe/exchange/test_exchange.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hopper import lowered_for_h100
from test_dispatch import CASES, DISPATCHERS, SHAPES

from moejax.moe.dispatch import capacity, drop
from moejax.moe.dispatch.grouped import grouped
from moejax.moe.experts import ExpertWeights
from moejax.moe.grouped_matmul import Table

# Activation, and whether there are biases.
FORMS = {
    "biases": ("swiglu", True),
    "clamped": ("clamped_swiglu", False),
    "gpt-oss": ("clamped_swiglu", True),
}


@functools.cache
def inputs(shape, form, seed=0):
    """x, gate, weights and the outputs' cotangent; a third of all gates and ups are clamped."""
    rng = np.random.default_rng(seed)
    draw = lambda *size, scale=1.0: jnp.asarray(scale * rng.normal(size=size), jnp.float32)
    experts, width, hidden = shape.experts, shape.width, shape.hidden
    activation, biased = FORMS[form]
    scale = 7.0 if activation == "clamped_swiglu" else 1.0
    weights = ExpertWeights(
        draw(experts, width, 2, hidden, scale=scale * width**-0.5),
        draw(experts, hidden, width, scale=hidden**-0.5),
        draw(experts, 2, hidden) if biased else None,
        draw(experts, width) if biased else None,
        activation,
    )
    gate = jnp.asarray(rng.uniform(0.1, 1.0, (shape.tokens, shape.top_k)), jnp.float32)
    return draw(shape.tokens, width), gate, weights, draw(shape.tokens, width)


def activation_by_hand(name, g, u):
    """The hidden values and their derivatives by gate and by up."""
    if name == "swiglu":
        sigmoid = 1 / (1 + np.exp(-g))
        return g * sigmoid * u, u * sigmoid * (1 + g * (1 - sigmoid)), g * sigmoid
    inside = g <= 7, np.abs(u) <= 7
    g, u = np.minimum(g, 7), np.clip(u, -7, 7)
    sigmoid = 1 / (1 + np.exp(-1.702 * g))
    by_gate = (u + 1) * sigmoid * (1 + 1.702 * g * (1 - sigmoid))
    return g * sigmoid * (u + 1), by_gate * inside[0], g * sigmoid * inside[1]


def numpy_layer(x, expert, gate, weights, cotangent):
    """One assignment after another in float64; outputs and gradients of x, gate and weights."""
    wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    x, gate, w, cotangent = wide((x, gate, weights, cotangent))
    y, d_x, d_gate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    d_w = jax.tree.map(np.zeros_like, w)
    biased = w.down_bias is not None
    for t, k in np.ndindex(expert.shape):
        e = int(expert[t, k])
        if e >= len(w.down):
            continue
        both = np.einsum("d,dgf->gf", x[t], w.gate_up[e]) + (w.gate_up_bias[e] if biased else 0)
        hidden, by_gate, by_up = activation_by_hand(weights.activation, *both)
        out = hidden @ w.down[e] + (w.down_bias[e] if biased else 0)
        y[t] += gate[t, k] * out
        d_gate[t, k] = cotangent[t] @ out
        d_out = gate[t, k] * cotangent[t]
        d_w.down[e] += np.outer(hidden, d_out)
        d_both = (w.down[e] @ d_out) * np.stack([by_gate, by_up])
        d_w.gate_up[e] += x[t][:, None, None] * d_both
        d_x[t] += np.einsum("dgf,gf->d", w.gate_up[e], d_both)
        if biased:
            d_w.down_bias[e] += d_out
            d_w.gate_up_bias[e] += d_both
    return y, (d_x, d_gate, d_w)


@functools.cache
def compiled(name):
    def run(x, expert, gate, weights, cotangent):
        call = lambda x, gate, weights: DISPATCHERS[name](x, expert, gate, weights)
        y, pull_back = jax.vjp(call, x, gate, weights)
        return y, pull_back(cotangent)

    return jax.jit(run)


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_every_gradient_equal_numpy(name, form):
    shape = SHAPES["small"]
    x, gate, weights, cotangent = inputs(shape, form)
    for case in ("balanced", "all to the last", "one row", "one row in three"):
        expert = np.asarray(CASES[case](shape), np.int32)
        got = compiled(name)(x, jnp.asarray(expert), gate, weights, cotangent)
        wanted = numpy_layer(x, expert, gate, weights, cotangent)
        # Experts without rows, and tokens without experts, have zeros, met exactly.
        tiny.assert_trees_close(got, wanted, 1e-5)
        idle = np.setdiff1d(np.arange(shape.experts), expert)
        for leaf in jax.tree.leaves(got[1][2]):
            assert not np.any(np.asarray(leaf)[idle])
        nobody = np.all(expert >= shape.experts, axis=1)
        assert not np.any(np.asarray(got[0])[nobody]) and not np.any(np.asarray(got[1][0])[nobody])


@pytest.mark.parametrize("name", ["blocks", "grouped"])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_other_sizes(name, shape):
    shape = SHAPES[shape]
    x, gate, weights, cotangent = inputs(shape, "gpt-oss", seed=1)
    for case in ("the last K experts only", "one row in three"):
        expert = np.asarray(CASES[case](shape), np.int32)
        got = compiled(name)(x, jnp.asarray(expert), gate, weights, cotangent)
        tiny.assert_trees_close(got, numpy_layer(x, expert, gate, weights, cotangent), 1e-5)


@pytest.mark.parametrize("name", ["blocks", "grouped"])
def test_what_nobody_computes_may_hold_anything(name):
    shape = SHAPES["small"]
    x, gate, weights, cotangent = inputs(shape, "gpt-oss")
    expert = jnp.asarray(CASES["one row in three"](shape), jnp.int32)
    nobody = expert >= shape.experts
    spoil = lambda rows: jnp.where(jnp.all(nobody, axis=1, keepdims=True), jnp.nan, rows)
    wanted = compiled(name)(x, expert, gate, weights, cotangent)
    gates = jnp.where(nobody, jnp.nan, gate)
    got = compiled(name)(spoil(x), expert, gates, weights, spoil(cotangent))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_dropped_row_gets_no_bias():
    # One expert of zeros, so that all a token gets is its gate times the last bias; two slots.
    zeros = jnp.zeros
    weights = ExpertWeights(
        zeros((1, 3, 2, 4)), zeros((1, 4, 3)), jnp.ones((1, 2, 4)), jnp.full((1, 3), 5.0)
    )
    gate = jnp.array([[0.5], [2.0], [1.0]])

    def objective(bias):
        expert, _ = drop(zeros((3, 1), jnp.int32), gate, num_experts=1, group=3, slots=2)
        y = capacity(jnp.ones((3, 3)), expert, gate, weights.replace(down_bias=bias), slots=2)
        return jnp.sum(y), y

    gradient, y = jax.jit(jax.grad(objective, has_aux=True))(weights.down_bias)
    np.testing.assert_array_equal(y, [[2.5] * 3, [10.0] * 3, [0.0] * 3])
    np.testing.assert_array_equal(gradient, [[2.5] * 3])


def test_experts_equal_transformers():
    why = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    from transformers.models.gpt_oss import modeling_gpt_oss as hf

    shape = SHAPES["small"]
    x, gate, weights, cotangent = inputs(shape, "gpt-oss", seed=2)
    expert = np.asarray(CASES["balanced"](shape), np.int32)
    config = transformers.GptOssConfig(
        hidden_size=shape.width, intermediate_size=shape.hidden, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k, experts_implementation="eager",
    )  # fmt: skip
    theirs = hf.GptOssExperts(config).float()
    # Theirs have gate and up by turns in one axis.
    turns = lambda a: np.swapaxes(a, -1, -2).reshape(*a.shape[:-2], -1)
    by_us = lambda a: np.swapaxes(a.reshape(*a.shape[:-1], -1, 2), -1, -2)
    numbers = jax.tree.map(np.asarray, weights)
    values = {
        "gate_up_proj": turns(numbers.gate_up), "gate_up_proj_bias": turns(numbers.gate_up_bias),
        "down_proj": numbers.down, "down_proj_bias": numbers.down_bias,
    }  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            getattr(theirs, name).copy_(torch.tensor(value))
    given = torch.tensor(np.asarray(x), requires_grad=True)
    gates = torch.tensor(np.asarray(gate), requires_grad=True)
    out = theirs(given, torch.tensor(expert, dtype=torch.int64), gates)
    out.backward(torch.tensor(np.asarray(cotangent)))

    gradient = lambda name: getattr(theirs, name).grad.numpy()
    d_weights = ExpertWeights(
        by_us(gradient("gate_up_proj")), gradient("down_proj"),
        by_us(gradient("gate_up_proj_bias")), gradient("down_proj_bias"), "clamped_swiglu",
    )  # fmt: skip
    wanted = out.detach().numpy(), (given.grad.numpy(), gates.grad.numpy(), d_weights)
    got = compiled("blocks")(x, jnp.asarray(expert), gate, weights, cotangent)
    tiny.assert_trees_close(got, wanted, 1e-5)


def test_gpt_oss_lowers_for_cuda_without_adding_rows_by_index():
    narrow = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16)
    weights = ExpertWeights(
        narrow(16, 256, 2, 128), narrow(16, 128, 256), narrow(16, 2, 128), narrow(16, 256),
        "clamped_swiglu",
    )  # fmt: skip

    def both_ways(x, expert, gate, weights, cotangent):
        call = lambda x, gate, weights: grouped(x, expert, gate, weights, table=Table())
        return jax.vjp(call, x, gate, weights)[1](cotangent)

    x, choices = narrow(1024, 256), lambda dtype: jax.ShapeDtypeStruct((1024, 4), dtype)
    program = lowered_for_h100(
        both_ways, x, choices(jnp.int32), choices(jnp.float32), weights, x
    )  # fmt: skip
    # The counts, and the inverse of the sort.
    assert program.count('"stablehlo.scatter"(') == 2
