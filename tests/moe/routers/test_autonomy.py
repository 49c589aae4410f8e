"""Autonomy of experts: the choice is by the norms of their own activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe import MoEConfig
from moejax.moe.layer import MoELayer
from moejax.moe.routers import autonomy
from moejax.moe.routers.autonomy import AutonomyOptions, AutonomyRouter, activation_norms
from moejax.moe.routers.base import ExpertProbe, RouterInputs


def route(x, first, valid=None, k=2, **options):
    router = AutonomyRouter(AutonomyOptions(**options), len(first), k, parent=None)
    valid = jnp.ones(x.shape[:2], bool) if valid is None else jnp.asarray(valid)
    inputs = RouterInputs(
        jnp.asarray(x), valid, experts=ExpertProbe(None, jnp.asarray(first), None)
    )
    return router.apply({}, inputs)


def test_the_largest_norms_are_chosen_and_gates_are_the_softmax_of_all():
    # Width 2, rank 2. Experts: 3 · 1, a matrix that reads feature 0 only twice over, and 1.
    # Token (1, 0): norms 3, 2 sqrt 2, 1: experts 0, 1. Token (0, 2): norms 6, 0, 2: experts 0, 2.
    first = np.array([[[3, 0], [0, 3]], [[2, 2], [0, 0]], [[1, 0], [0, 1]]], np.float32)
    x = np.array([[[1, 0], [0, 2]]], np.float32)
    out = jax.jit(route)(x, first)
    norms = np.array([[3, np.sqrt(8), 1], [6, 0, 2]])
    np.testing.assert_allclose(out.logits[0], norms, atol=1e-6)
    np.testing.assert_array_equal(out.expert, [[0, 1], [0, 2]])
    p = np.exp(norms) / np.exp(norms).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        out.gate, np.take_along_axis(p, np.asarray(out.expert), 1), rtol=1e-5
    )
    # Balance loss: loads (2, 1, 1) / 4, 3 · sum f P, at weight .01.
    wanted = 0.01 * 3 * (p.mean(axis=0) * [0.5, 0.25, 0.25]).sum()
    np.testing.assert_allclose(out.aux_loss, wanted, rtol=1e-5)


def test_norms_by_blocks_of_experts_are_the_same_with_the_same_gradient(monkeypatch):
    rng = np.random.default_rng(0)
    x, first = rng.normal(size=(10, 6)), rng.normal(size=(6, 6, 3))
    x, first = jnp.asarray(x, jnp.float32), jnp.asarray(first, jnp.float32)
    total = lambda x, first: jnp.sum(jnp.sin(activation_norms(x, first)))
    both = jax.value_and_grad(total, argnums=(0, 1))
    whole, norms = jax.jit(both)(x, first), activation_norms(x, first)
    wanted = np.linalg.norm(np.einsum("td,edr->ter", x, first), axis=-1)
    np.testing.assert_allclose(norms, wanted, rtol=1e-5)
    # 10 tokens of rank 3, room for 70 numbers: two experts at a time, of six.
    monkeypatch.setattr(autonomy, "BLOCK", 70)
    parts = jax.jit(lambda *args: both(*args))(x, first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    assert "scan" in str(jax.make_jaxpr(activation_norms)(x, first))


def test_gradients_reach_the_experts_and_a_token_of_zeros_is_harmless():
    rng = np.random.default_rng(1)
    first = jnp.asarray(rng.normal(size=(4, 6, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, 8, 6)), jnp.float32).at[0, 0].set(0.0).at[0, 7].set(0.0)
    valid = np.arange(8)[None] < 7

    def total(x, first):
        out = route(x, first, valid)
        return jnp.sum(out.gate * jnp.arange(16.0).reshape(8, 2)) + out.aux_loss

    to_x, to_first = jax.jit(jax.grad(total, argnums=(0, 1)))(x, first)
    assert np.isfinite(to_x).all() and np.isfinite(to_first).all()
    assert np.all(np.any(np.asarray(to_first), axis=(1, 2)))
    assert not np.any(to_x[0, 7])


def test_through_the_layer_later_tokens_change_nothing_and_it_has_no_parameters():
    name = f"{AutonomyRouter.__module__}.{AutonomyRouter.__name__}"
    config = MoEConfig(
        4, 2, 8, dispatch="dense_loop", gate_rank=3, router=AutonomyOptions(name=name)
    )
    layer = MoELayer(config)
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    valid = jnp.ones((1, 6), bool)
    shapes = jax.eval_shape(layer.init, jax.random.key(1), RouterInputs(x, valid))
    variables = tiny.draw(shapes)
    assert set(variables["params"]) == {"experts"}
    run = jax.jit(lambda x: layer.apply(variables, RouterInputs(x, valid)).y)
    one, two = run(x), run(x.at[:, 3:].multiply(-2.0))
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    assert np.any(one[:, 3:] != two[:, 3:])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="gate_rank"):
        MoEConfig(4, 2, 8, router=AutonomyOptions())
    with pytest.raises(ConfigError, match="gate_rank"):
        AutonomyRouter(AutonomyOptions(), 4, 2, parent=None).apply(
            {}, RouterInputs(jnp.zeros((1, 2, 6)), jnp.ones((1, 2), bool))
        )
    with pytest.raises(ConfigError, match="coupling_loss_weight"):
        AutonomyOptions(coupling_loss_weight=1.0)
