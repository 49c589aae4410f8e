"""Experts' weights and arithmetic."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.moe.experts import Experts, SwiGLU, swiglu, swiglu_gradient

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


def test_swiglu_gradient_is_the_derivative():
    both = jax.random.normal(jax.random.key(0), (7, 2, 5))
    cotangent = jax.random.normal(jax.random.key(1), (7, 5))
    wanted = jax.jit(lambda b, c: jax.vjp(swiglu, b)[1](c)[0])(both, cotangent)
    assert tiny.relative_error(swiglu_gradient(both, cotangent), wanted) < 1e-6


def test_a_shared_expert_is_the_same_formula():
    rng = np.random.default_rng(0)
    x, gate_up = rng.normal(size=(3, 4)), rng.normal(size=(4, 2, 6))
    down = rng.normal(size=(6, 4))
    params = {"gate_up": jnp.asarray(gate_up), "down": jnp.asarray(down)}
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    got = jax.jit(SwiGLU(6).apply)({"params": params}, jnp.asarray(x, jnp.float32))
    gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    assert tiny.relative_error(got, (gate / (1 + np.exp(-gate)) * up) @ down) < 1e-5
