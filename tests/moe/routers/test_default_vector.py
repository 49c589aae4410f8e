"""Default MoE: stand-ins for the experts that were not chosen, and how they move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe import MoEConfig
from moejax.moe.experts import apply_batched
from moejax.moe.layer import MoELayer
from moejax.moe.routers.base import RouterInputs
from moejax.moe.routers.default_vector import DefaultVectorOptions, DefaultVectorRouter

P = np.array([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]])
DEFAULT = np.array([[1.0, 0, 0], [0, 10, 0], [0, 0, 100]])


def route(x, default, valid=None, **options):
    router = DefaultVectorRouter(DefaultVectorOptions(**options), 3, 1, parent=None)
    variables = {"params": {"kernel": jnp.eye(3)}, "router_state": {"default": default}}
    valid = jnp.ones(x.shape[:2], bool) if valid is None else jnp.asarray(valid)
    return router.apply(variables, RouterInputs(jnp.asarray(x, jnp.float32), valid))


def test_the_others_stand_in_with_their_probabilities():
    # Token 0 chooses expert 0: .3 · d_1 + .2 · d_2. Token 1 expert 2: .1 d_0 + .2 d_1.
    out = jax.jit(route)(np.log(P), jnp.asarray(DEFAULT, jnp.float32))
    np.testing.assert_array_equal(out.expert, [[0], [2]])
    np.testing.assert_allclose(out.gate, [[0.5], [0.7]], rtol=1e-5)
    np.testing.assert_allclose(out.bypass[0], [[0, 3, 20], [0.1, 2, 0]], rtol=1e-5)
    padded = jax.jit(route)(np.log(P), jnp.asarray(DEFAULT, jnp.float32), [[True, False]])
    assert not np.any(padded.bypass[0, 1])


def test_the_router_learns_of_every_expert_from_every_token():
    # One token, y' = sum of the bypass's entries: dy' / dp is (0, 10, 100), through the softmax
    # p_j (g_j - sum p g), with sum p g = 3 + 20 = 23.
    total = lambda x, default: jnp.sum(route(x, default, balance_loss_weight=0.0).bypass)
    x, default = jnp.asarray(np.log(P[:, :1]), jnp.float32), jnp.asarray(DEFAULT, jnp.float32)
    to_x, to_default = jax.jit(jax.grad(total, argnums=(0, 1)))(x, default)
    np.testing.assert_allclose(to_x[0, 0], P[0, 0] * (np.array([0, 10, 100]) - 23), rtol=1e-4)
    assert not np.any(to_default)


def layer(dispatch="blocks", **moe):
    name = f"{DefaultVectorRouter.__module__}.{DefaultVectorRouter.__name__}"
    options = DefaultVectorOptions(name=name)
    return MoELayer(MoEConfig(4, 2, 8, dispatch=dispatch, router=options, **moe))


@pytest.fixture(scope="module")
def case():
    """Variables, inputs with padding, and a training pass with its statistics."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 6))
    valid = jnp.asarray(np.arange(8)[None] < np.array([[8], [5]]))
    inputs = RouterInputs(x, valid, train=True)
    variables = tiny.draw(jax.eval_shape(layer().init, jax.random.key(1), inputs))
    run = lambda name, train: jax.jit(
        lambda variables, x: layer(name).apply(variables, inputs.replace(x=x, train=train))
    )
    return variables, inputs, run


@pytest.mark.parametrize("dispatch", ["blocks", "dense_loop"])
def test_the_running_means_are_of_the_chosen_experts_outputs(case, dispatch):
    variables, inputs, run = case
    out = run(dispatch, True)(variables, inputs.x)
    # Each expert over all tokens, summed over those that chose it, padding left out.
    kernel = np.asarray(variables["params"]["router"]["kernel"])
    chosen = np.argsort(-(np.asarray(inputs.x) @ kernel), axis=-1)[..., :2]
    hit = (chosen[..., None] == np.arange(4)).any(axis=2) & np.asarray(inputs.valid)[..., None]
    from moejax.moe.experts import ExpertWeights

    weights = ExpertWeights(**variables["params"]["experts"])
    rows = jnp.broadcast_to(inputs.x.reshape(1, 16, 6), (4, 16, 6))
    outputs = np.asarray(apply_batched(weights, rows)).reshape(4, 2, 8, 6)
    sums = np.einsum("bse,ebsd->ed", hit, outputs)
    np.testing.assert_array_equal(out.stats["load"], hit.sum(axis=(0, 1)))
    assert tiny.relative_error(out.stats["output_sum"], sums) < 1e-5
    # One step: .9 of the past, .1 of the mean; an expert without a token stays.
    router = MoELayer.make_router(layer().config, parent=None)
    stats = {"load": out.stats["load"].at[1].set(0), "output_sum": out.stats["output_sum"]}
    state = jax.jit(router.update)(variables["router_state"]["router"], stats)
    before = np.asarray(variables["router_state"]["router"]["default"])
    wanted = 0.9 * before + 0.1 * sums / np.maximum(hit.sum(axis=(0, 1)), 1)[:, None]
    wanted[1] = before[1]
    assert tiny.relative_error(state["default"], wanted) < 1e-5


def test_layers_may_be_stacked_and_an_evaluation_moves_nothing(case):
    variables, inputs, run = case
    router = MoELayer.make_router(layer().config, parent=None)
    state = {"default": jnp.ones((3, 4, 6))}
    stats = {"load": jnp.ones((3, 4)), "output_sum": jnp.zeros((3, 4, 6))}
    np.testing.assert_allclose(router.update(state, stats)["default"], 0.9, rtol=1e-6)
    out = run("blocks", False)(variables, inputs.x)
    assert "output_sum" not in out.stats
    assert router.update(state, out.stats) is state


def test_later_tokens_change_nothing_and_the_second_pass_has_no_gradient(case):
    variables, inputs, run = case
    both = run("blocks", True)
    one, two = both(variables, inputs.x), both(variables, inputs.x.at[:, 4:].multiply(-2.0))
    np.testing.assert_array_equal(one.y[:, :4], two.y[:, :4])
    # Statistics are no way back to the parameters.
    total = lambda params: jnp.sum(
        layer().apply({**variables, "params": params}, inputs).stats["output_sum"]
    )
    assert not any(
        np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(total))(variables["params"]))
    )


def test_what_does_not_fit_is_refused():
    inputs = RouterInputs(jnp.zeros((1, 2, 6)), jnp.ones((1, 2), bool))
    with pytest.raises(ConfigError, match="latent_dim"):
        jax.eval_shape(layer(latent_dim=3).init, jax.random.key(0), inputs)
    with pytest.raises(ConfigError, match="decay"):
        DefaultVectorOptions(decay=1.0)
