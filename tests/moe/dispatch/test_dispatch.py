"""All dispatchers against the reference loop and against NumPy, in values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.dispatch import blocks, capacity, dense_loop, dispatch
from moejax.moe.experts import ExpertWeights
from moejax.moe.moe_config import MoEConfig

TOKENS, EXPERTS, TOP_K, WIDTH, HIDDEN = 22, 5, 2, 8, 6
GROUP = 11

# Capacity with a slot for every assignment of a group drops nothing, even where a token's choices
# repeat. Blocks of 8 do not divide 22 tokens' 44 assignments; blocks of 1 hold one row each.
DISPATCHERS = {
    "dense_loop": dense_loop,
    "capacity": lambda *args: capacity(*args, group=GROUP, slots=GROUP * TOP_K),
    "blocks of 8": lambda *args: blocks(*args, block=8),
    "blocks of 1": lambda *args: blocks(*args, block=1),
}


def value_and_gradients(dispatcher):
    """Jitted: outputs, drops, and the gradients of x, gate and both weights."""

    def run(x, expert, gate, weights, cotangent):
        def objective(x, gate, weights):
            y, dropped = dispatcher(x, expert, gate, weights)
            return jnp.sum(y * cotangent), (y, dropped)

        gradients, out = jax.grad(objective, (0, 1, 2), has_aux=True)(x, gate, weights)
        return out, gradients

    return jax.jit(run)


RUN = {name: value_and_gradients(dispatcher) for name, dispatcher in DISPATCHERS.items()}


def numpy_layer(x, expert, gate, gate_up, down, cotangent):
    """One assignment after another in float64, with the chain rule written out."""
    x, gate, gate_up, down, cotangent = (
        np.asarray(a, np.float64) for a in (x, gate, gate_up, down, cotangent)
    )
    y, d_x, d_gate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    d_gate_up, d_down = np.zeros_like(gate_up), np.zeros_like(down)
    for t, k in np.ndindex(expert.shape):
        e = int(expert[t, k])
        if e >= len(down):
            continue
        g, u = x[t] @ gate_up[e, :, 0], x[t] @ gate_up[e, :, 1]
        sigmoid = 1 / (1 + np.exp(-g))
        hidden = g * sigmoid * u
        out = hidden @ down[e]
        y[t] += gate[t, k] * out
        d_gate[t, k] = cotangent[t] @ out
        d_out = gate[t, k] * cotangent[t]
        d_down[e] += np.outer(hidden, d_out)
        d_hidden = down[e] @ d_out
        d_u = d_hidden * g * sigmoid
        d_g = d_hidden * u * sigmoid * (1 + g * (1 - sigmoid))
        d_gate_up[e, :, 0] += np.outer(x[t], d_g)
        d_gate_up[e, :, 1] += np.outer(x[t], d_u)
        d_x[t] += gate_up[e, :, 0] @ d_g + gate_up[e, :, 1] @ d_u
    return y, (d_x, d_gate, ExpertWeights(d_gate_up, d_down))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = ExpertWeights(
        normal(EXPERTS, WIDTH, 2, HIDDEN) * WIDTH**-0.5,
        normal(EXPERTS, HIDDEN, WIDTH) * HIDDEN**-0.5,
    )
    gate = jnp.asarray(rng.uniform(0.1, 1.0, (TOKENS, TOP_K)), jnp.float32)
    return normal(TOKENS, WIDTH), gate, weights, normal(TOKENS, WIDTH)


def check_against_numpy(expert, seed=0):
    """Every dispatcher, relative error tensor by tensor, and exact zeros where zeros belong."""
    x, gate, weights, cotangent = inputs(seed)
    y, gradients = numpy_layer(x, expert, gate, weights.gate_up, weights.down, cotangent)
    for name, run in RUN.items():
        (got, dropped), got_gradients = run(x, jnp.asarray(expert), gate, weights, cotangent)
        assert float(dropped) == 0, name
        tiny.assert_trees_close(got, y, 1e-5)
        tiny.assert_trees_close(got_gradients, gradients, 1e-5)
        foreign = np.all(expert >= EXPERTS, axis=1)
        assert not np.any(np.asarray(got)[foreign]), name
        assert not np.any(np.asarray(got_gradients[0])[foreign]), name
        assert not np.any(np.asarray(got_gradients[1])[expert >= EXPERTS]), name
        idle = np.setdiff1d(np.arange(EXPERTS), expert)
        for leaf in jax.tree.leaves(got_gradients[2]):
            assert not np.any(np.asarray(leaf)[idle]), name


def pairs(first, second):
    return np.stack([np.full(TOKENS, first), np.full(TOKENS, second)], axis=1).astype(np.int32)


def one_row():
    """A single assignment, to expert 3, of the last token's second choice."""
    expert = pairs(EXPERTS, EXPERTS)
    expert[-1, 1] = 3
    return expert


CASES = {
    "balanced": np.stack([np.arange(TOKENS) % 5, (np.arange(TOKENS) + 2) % 5], 1).astype(np.int32),
    "all to one expert": pairs(4, EXPERTS),
    "two experts of five": pairs(0, 3),
    "one row": one_row(),
    "nothing at all": pairs(EXPERTS, EXPERTS),
    "a block filled to its last row": np.where(np.arange(TOKENS)[:, None] < 8, pairs(1, 2), 5),
    "one row more than a block": np.where(np.arange(TOKENS)[:, None] < 9, pairs(1, 2), 5),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_numpy(name):
    check_against_numpy(CASES[name].astype(np.int32))


@st.composite
def choices(draw):
    """Distinct experts of each token, drawn unevenly; index E is padding or a foreign expert."""
    weights = [draw(st.sampled_from([0, 1, 1, 5, 40])) for _ in range(EXPERTS + 1)]
    chance = np.asarray(weights, np.float64) + 1e-3
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    expert = np.empty((TOKENS, TOP_K), np.int32)
    for t in range(TOKENS):
        expert[t] = rng.choice(EXPERTS + 1, TOP_K, replace=False, p=chance / chance.sum())
        if rng.random() < 0.1:
            expert[t] = EXPERTS
    return expert


@settings(max_examples=25, deadline=None, derandomize=True)
@given(choices(), st.integers(0, 1000))
def test_drawn_loads_equal_numpy(expert, seed):
    check_against_numpy(expert, seed)


def reference(x, expert, gate, weights):
    return RUN["dense_loop"](x, expert, gate, weights, x)[0][0]


def test_experts_on_other_devices_are_indices_beyond_e():
    # What the exchange does: two devices with experts 0, 1 and 2, 3 of four, whose outputs add up.
    x, gate, weights, _ = inputs()
    expert = jnp.asarray(CASES["balanced"])
    expert = jnp.where(expert == 4, EXPERTS, expert)
    run = jax.jit(DISPATCHERS["blocks of 8"])
    total = 0
    for first in (0, 2):
        mine = (expert >= first) & (expert < first + 2)
        part = jax.tree.map(lambda w, first=first: w[first : first + 2], weights)
        total += run(x, jnp.where(mine, expert - first, 2), gate, part)[0]
    assert tiny.relative_error(total, reference(x, expert, gate, weights)) < 1e-6


@pytest.mark.parametrize("name", ["dense_loop", "capacity", "blocks", "auto"])
def test_the_config_names_the_dispatcher(name):
    x, gate, weights, _ = inputs()
    config = MoEConfig(EXPERTS, TOP_K, HIDDEN, dispatch=name, capacity_factor=5.0)
    expert = jnp.asarray(CASES["balanced"])
    y, dropped = jax.jit(lambda *args: dispatch(config, GROUP, *args))(x, expert, gate, weights)
    assert tiny.relative_error(y, reference(x, expert, gate, weights)) < 1e-5
    assert float(dropped) == 0


@pytest.mark.parametrize("name", ["dense_loop", "capacity", "blocks of 8"])
def test_bfloat16_in_bfloat16_out(name):
    x, gate, weights, _ = inputs()
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, weights))
    expert = jnp.asarray(CASES["balanced"])
    y, _ = jax.jit(DISPATCHERS[name])(narrow[0], expert, gate, narrow[1])
    assert y.dtype == jnp.bfloat16
    assert tiny.relative_error(y, reference(x, expert, gate, weights)) < 0.02
