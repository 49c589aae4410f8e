"""Experts' weights and arithmetic."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.moe.experts import (
    Experts,
    SwiGLU,
    activate,
    activation_gradient,
    clamped_swiglu,
    swiglu,
)

COUNT, WIDTH, HIDDEN = 4, 48, 64


@pytest.fixture(scope="module")
def weights():
    experts = Experts(COUNT, HIDDEN)
    init = lambda key: experts.init(key, WIDTH, jnp.dtype("float32"))["params"]
    return nn.meta.unbox(jax.jit(init)(jax.random.key(0)))


@pytest.mark.parametrize(
    ("name", "fan_in", "shape"),
    [("gate_up", WIDTH, (COUNT, WIDTH, 2, HIDDEN)), ("down", HIDDEN, (COUNT, HIDDEN, WIDTH))],
)
def test_initial_variance_is_one_over_each_experts_own_fan_in(weights, name, fan_in, shape):
    kernel = np.asarray(weights[name])
    assert kernel.shape == shape
    for expert in kernel:
        # At least 3,072 samples: the deviation is known to 1.3 %, so this is four sigma.
        np.testing.assert_allclose(expert.std(), fan_in**-0.5, rtol=0.05)


def test_experts_start_different(weights):
    for kernel in weights.values():
        flat = np.asarray(kernel).reshape(COUNT, -1)
        correlation = np.corrcoef(flat) - np.eye(COUNT)
        assert np.abs(correlation).max() < 0.1


def test_a_given_deviation_is_used():
    init = jax.jit(lambda key: SwiGLU(HIDDEN, 0.02).init(key, jnp.zeros((1, WIDTH))))
    params = nn.meta.unbox(init(jax.random.key(0))["params"])
    np.testing.assert_allclose(np.std(params["gate_up"]), 0.02, rtol=0.05)


def test_swiglu_by_hand():
    # silu(ln 3) = ln 3 · 3 / 4, times 2.
    both = jnp.array([[np.log(3.0)], [2.0]])
    np.testing.assert_allclose(swiglu(both), [np.log(3.0) * 0.75 * 2], rtol=1e-6)


def test_clamped_swiglu_by_hand():
    # Gate ln 3 / 1.702 has sigmoid(ln 3) = 3/4; (up + 1) = 3. Then gate 100 is 7, with a sigmoid
    # of 1 to five digits, and up -9 is -7: 7 · (-7 + 1). A gate of -100 is not clamped: nothing.
    slope = np.log(3.0) / 1.702
    both = jnp.array([[slope, 100.0, -100.0], [2.0, -9.0, 9.0]])
    np.testing.assert_allclose(clamped_swiglu(both), [slope * 0.75 * 3, -42.0, 0.0], rtol=1e-5)


def test_at_a_limit_the_gradient_passes_and_beyond_it_does_not():
    both = jnp.array([[7.0, 7.001, -50.0], [7.0, 7.001, -7.001]])
    ones = jnp.ones(3)
    for gradient in (
        jax.vjp(clamped_swiglu, both)[1](ones)[0],
        activation_gradient("clamped_swiglu", both, ones),
    ):
        # d/d gate = up + 1 and d/d up = gate, where the sigmoid is 1.
        np.testing.assert_allclose(gradient[:, 0], [8.0, 7.0], rtol=1e-3)
        np.testing.assert_array_equal(gradient[:, 1], [0.0, 0.0])
        assert float(gradient[1, 2]) == 0.0


@pytest.mark.parametrize("name", ["swiglu", "clamped_swiglu"])
def test_the_gradient_by_hand_is_the_derivative(name):
    both = 5 * jax.random.normal(jax.random.key(0), (7, 2, 5))
    cotangent = jax.random.normal(jax.random.key(1), (7, 5))
    wanted = jax.jit(lambda b, c: jax.vjp(lambda b: activate(name, b), b)[1](c)[0])(both, cotangent)
    assert tiny.relative_error(activation_gradient(name, both, cotangent), wanted) < 1e-6


def test_biases_begin_at_zero_and_know_their_axes():
    experts = Experts(COUNT, HIDDEN, 0.02, bias=True, activation="clamped_swiglu")
    init = jax.jit(lambda key: experts.init(key, WIDTH, jnp.dtype("float32")))
    boxed = init(jax.random.key(0))["params"]
    assert boxed["gate_up_bias"].names == ("expert", None, "mlp")
    assert boxed["down_bias"].names == ("expert", "embed")
    params = nn.meta.unbox(boxed)
    np.testing.assert_array_equal(params["gate_up_bias"], np.zeros((COUNT, 2, HIDDEN)))
    np.testing.assert_array_equal(params["down_bias"], np.zeros((COUNT, WIDTH)))
    weights, _ = experts.apply({"params": params}, WIDTH, jnp.dtype("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("bfloat16")}
    assert weights.activation == "clamped_swiglu"


def test_a_shared_expert_is_the_same_formula():
    rng = np.random.default_rng(0)
    x, gate_up = rng.normal(size=(3, 4)), rng.normal(size=(4, 2, 6))
    down = rng.normal(size=(6, 4))
    params = {"gate_up": jnp.asarray(gate_up), "down": jnp.asarray(down)}
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    got = jax.jit(SwiGLU(6).apply)({"params": params}, jnp.asarray(x, jnp.float32))
    gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    assert tiny.relative_error(got, (gate / (1 + np.exp(-gate)) * up) @ down) < 1e-5
