"""X-MoE: cases by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.cosine import XMoEOptions, XMoERouter, unit

EYE = {"reduction": jnp.eye(2), "scale": jnp.ones(1)}


@functools.cache
def compiled(experts, top_k, temperature):
    options = XMoEOptions(router_dim=2, temperature=temperature)
    router = XMoERouter(options, experts, top_k)
    run = lambda params, x: router.apply(
        {"params": params}, RouterInputs(x, jnp.ones(x.shape[:2], bool))
    )
    return jax.jit(run)


def route(params, x, top_k, temperature=0.07):
    """Routes tokens (B, S, D) with the given parameters."""
    run = compiled(params["kernel"].shape[1], top_k, temperature)
    return run(params, jnp.asarray(x, jnp.float32))


def test_the_nearest_direction_wins_whatever_the_norms():
    # Embeddings along 0, 90 and 180 degrees with norms 1, 100 and 0.01. Token (3, 4) has cosines
    # .6, .8, -.6; its dot products would be 3, 400, -.03. With temperature .2: logits 3, 4, -3.
    params = {**EYE, "kernel": jnp.array([[1.0, 0, -0.01], [0, 100, 0]])}
    out = route(params, [[[3.0, 4.0], [300, 400], [-5, 0.1]]], 2, temperature=0.2)
    np.testing.assert_array_equal(out.expert, [[1, 0], [1, 0], [2, 1]])
    p = np.exp([4, 3, -3]) / np.exp([4, 3, -3]).sum()
    np.testing.assert_allclose(out.gate[:2], np.tile(p[:2], (2, 1)), rtol=1e-4)
    np.testing.assert_allclose(out.logits[0, 0], [3, 4, -3], rtol=1e-5)


def test_the_learned_temperature_moves_gates_but_neither_choices_nor_the_balance_loss():
    # Token 0 chooses expert 0 at 0 degrees, p = softmax(1 / .5, 0) = .8808; f = (1, 0):
    # loss 2 · .8808 = 1.7616 at any scale of the temperature. The gate at scale 2 is
    # softmax(1, 0) = .7311.
    params = {**EYE, "kernel": jnp.eye(2)}
    plain = route(params, [[[1.0, 0]]], 1, temperature=0.5)
    warmer = route({**params, "scale": jnp.full(1, 2.0)}, [[[1.0, 0]]], 1, temperature=0.5)
    np.testing.assert_allclose(plain.gate, [[0.880797]], rtol=1e-5)
    np.testing.assert_allclose(warmer.gate, [[0.731059]], rtol=1e-5)
    for out in (plain, warmer):
        np.testing.assert_array_equal(out.expert, [[0]])
        np.testing.assert_allclose(out.aux_loss, 0.01761594, rtol=1e-5)
    # A temperature that was learned below 0 counts as 1e-4: finite, and as sharp as can be.
    out = route({**params, "scale": jnp.full(1, -1.0)}, [[[1.0, 0.9]]], 1)
    np.testing.assert_allclose(out.gate, [[1.0]])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_a_later_token_changes_no_earlier_one():
    params = {**EYE, "kernel": jnp.array([[1.0, 0, -1], [0, 1, 0]])}
    one = route(params, [[[1.0, 0.5], [1, 0.5], [0, 1]]], 2, temperature=0.2)
    two = route(params, [[[1.0, 0.5], [-9, 0.5], [3, 1]]], 2, temperature=0.2)
    np.testing.assert_array_equal(one.expert[0], two.expert[0])
    np.testing.assert_array_equal(one.gate[0], two.gate[0])
    assert not np.array_equal(one.expert[1], two.expert[1])


def test_vectors_of_norm_one_and_a_zero_that_stays_with_a_finite_gradient():
    vectors = jnp.array([[3.0, 4.0], [0, 0], [5e-5, 0]])
    np.testing.assert_allclose(unit(vectors, -1), [[0.6, 0.8], [0, 0], [0.5, 0]], rtol=1e-5)
    gradient = jax.grad(lambda v: jnp.sum(unit(v, -1) * jnp.array([[1.0, 2.0]])))(vectors)
    assert np.isfinite(gradient).all()


def test_gradients_reach_all_parameters_and_not_padding():
    rng = np.random.default_rng(0)
    router = XMoERouter(XMoEOptions(), 6, 2)
    x = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32).at[1, 2].set(0.0)
    valid = jnp.array([[True] * 3, [True, True, False]])
    init = jax.jit(lambda key, x: nn.meta.unbox(router.init(key, RouterInputs(x, valid))))
    params = init(jax.random.key(0), x)["params"]
    # Half of 6 experts: 3 dimensions, in which the embeddings start orthogonal.
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "reduction": (5, 3), "kernel": (3, 6), "scale": (1,),
    }  # fmt: skip
    gram = params["kernel"] @ params["kernel"].T
    np.testing.assert_allclose(gram, 0.32**2 * np.eye(3), atol=1e-6)
    counts = router.options.counts(5, 6, 2)
    assert counts.params == sum(leaf.size for leaf in jax.tree.leaves(params))
    # 2 · 5 · 3 for the projection, 2 · 3 · 6 for the cosines.
    assert counts.flops_per_token == 66.0

    def outputs(params, x):
        out = router.apply({"params": params}, RouterInputs(x, valid, train=True))
        return jnp.sum(out.gate * jnp.arange(12.0).reshape(6, 2)), out.aux_loss

    by_gate, by_loss = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(params, x)
    for to_params, to_x in (by_gate, by_loss):
        np.testing.assert_array_equal(to_x[1, 2], np.zeros(5))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((to_params, to_x)))
    assert all(np.any(leaf) for leaf in by_gate[0].values())
    assert not np.any(by_loss[0]["scale"]), "no loss falls by the temperature alone"


def test_values_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"router.temperature"):
        XMoEOptions(temperature=0.0)
    with pytest.raises(ConfigError, match=r"router.router_dim"):
        XMoEOptions(router_dim=-1)
    assert XMoEOptions().width(32) == 16 and XMoEOptions().width(1) == 1
