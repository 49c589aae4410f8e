"""ReMoE: gates by hand, the sparsity loss, and a closed loop in which it finds its target."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import ConfigError
from moejax.moe.routers.base import RouterInputs
from moejax.moe.routers.remoe import SMALLEST, ReMoEOptions, ReMoERouter

# With an identity kernel a token's vector is its logits.
LOGITS = np.array([[[2.0, -1, 0, 0.5], [-1, -2, -3, 0], [1, 1, 1, -1]]], np.float32)


def route(x, k=2, kernel=None, weight=1e-8, valid=None, **options):
    experts = x.shape[-1] if kernel is None else kernel.shape[1]
    router = ReMoERouter(ReMoEOptions(**options), experts, k, parent=None)
    params = {"kernel": jnp.eye(experts) if kernel is None else kernel}
    state = {"weight": jnp.asarray(weight, jnp.float32)}
    inputs = RouterInputs(x, jnp.ones(x.shape[:2], bool) if valid is None else valid)
    return router.apply({"params": params, "router_state": state}, inputs)


run = jax.jit(route, static_argnames=("k",))


def test_every_expert_above_zero_runs_with_its_relu_as_gate():
    # Token 0: experts 0 and 3; token 1: none, for 0 is not above 0; token 2: experts 0, 1, 2.
    out = run(jnp.asarray(LOGITS))
    np.testing.assert_array_equal(out.expert, [[0, 4, 4, 3], [4, 4, 4, 4], [0, 1, 2, 4]])
    np.testing.assert_array_equal(out.gate, [[2, 0, 0, 0.5], [0, 0, 0, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(out.stats["load"], [2, 1, 1, 1])
    assert float(out.stats["unrouted"]) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_the_loss_is_an_l1_norm_weighed_by_the_load():
    # c = (2, 1, 1, 1), K T = 6, G = (3, 1, 1, .5) / 3; weight 10:
    #   10 · 4 · (2 · 3 + 1 + 1 + .5) / (6 · 3) = 10 · 34 / 18.
    np.testing.assert_allclose(run(jnp.asarray(LOGITS), weight=10.0).aux_loss, 340 / 18, rtol=1e-6)
    # Without token 2: c = (1, 0, 0, 1), K T = 4, G = (2, 0, 0, .5) / 2: 4 · 2.5 / (4 · 2).
    valid = jnp.array([[True, True, False]])
    out = run(jnp.asarray(LOGITS), weight=1.0, valid=valid)
    np.testing.assert_allclose(out.aux_loss, 1.25, rtol=1e-6)
    np.testing.assert_array_equal(out.stats["load"], [1, 0, 0, 1])


def test_the_gate_is_continuous_where_an_expert_comes_and_goes():
    below, above = (run(jnp.full((1, 1, 4), s * 1e-6)) for s in (-1.0, 1.0))
    assert int(below.expert[0, 0]) == 4 and int(above.expert[0, 0]) == 0
    assert 0 < float(above.gate[0, 0]) - float(below.gate[0, 0]) < 2e-6


def test_gradients_reach_the_router_and_not_the_weight():
    def total(kernel, weight):
        out = route(jnp.asarray(LOGITS), kernel=kernel, weight=weight)
        return out.aux_loss + jnp.sum(out.gate * jnp.arange(1.0, 13).reshape(3, 4))

    to_kernel, to_weight = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.eye(4), 1.0)
    assert np.all(np.any(np.asarray(to_kernel), axis=0)), "every expert that ran anywhere"
    assert float(to_weight) == 0


def test_the_weight_rises_where_too_many_run_and_falls_where_too_few_do():
    # E 4, K 2: target sparsity .5. Layer 0: 12 of 20 pairs on, sparsity .4: up. Layer 1: 8 on, .6:
    # down. Layer 2: 10 on: stays. Layer 3 saw no token: stays.
    router = ReMoERouter(ReMoEOptions(), 4, 2, parent=None)
    stats = {"tokens": jnp.array([5.0, 5, 5, 0]), "assignments": jnp.array([12.0, 8, 10, 0])}
    new = jax.jit(router.update)({"weight": jnp.full(4, 1e-8)}, stats)
    np.testing.assert_allclose(new["weight"], [1.2e-8, 1e-8 / 1.2, 1e-8, 1e-8], rtol=1e-6)
    # A weight that underflowed to 0 could never rise again.
    low = router.update({"weight": jnp.full(4, SMALLEST)}, stats)
    assert np.all(np.asarray(low["weight"]) >= SMALLEST * 0.999)


def test_sparsity_reaches_its_target_in_a_closed_loop():
    # 64 tokens to be fitted by a mixture of 8 vectors: target 1 - 2 / 8 = .75. Tokens share a
    # component, as a model's do: of tokens around 0 a half-space through 0 always holds half.
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (1, 64, 8)).at[..., 0].set(2.0)
    wanted = jnp.tanh(x @ jax.random.normal(keys[1], (8, 16)))[0]
    params = {
        "kernel": 0.3 * jax.random.normal(keys[2], (8, 8)),
        "values": 0.3 * jax.random.normal(keys[3], (8, 16)),
    }
    router = ReMoERouter(ReMoEOptions(start_weight=1e-3), 8, 2, parent=None)
    optimizer = optax.adam(1e-2)

    def loss(params, weight):
        variables = {"params": {"kernel": params["kernel"]}, "router_state": {"weight": weight}}
        out = router.apply(variables, RouterInputs(x, jnp.ones((1, 64), bool)))
        return jnp.mean((wanted - out.gate @ params["values"]) ** 2) + out.aux_loss, out.stats

    def step(carry, _):
        params, opt_state, state = carry
        grads, stats = jax.grad(loss, has_aux=True)(params, state["weight"])
        updates, opt_state = optimizer.update(grads, opt_state)
        state = router.update(state, stats)
        sparsity = 1 - stats["assignments"] / (64 * 8)
        return (optax.apply_updates(params, updates), opt_state, state), sparsity

    start = (params, optimizer.init(params), {"weight": jnp.asarray(1e-3)})
    _, sparsity = jax.jit(lambda c: jax.lax.scan(step, c, None, 600))(start)
    assert float(sparsity[0]) < 0.65
    assert abs(float(sparsity[-200:].mean()) - 0.75) < 0.03, sparsity[::100]


def test_values_out_of_range_are_refused_and_the_bill_is_an_expectation():
    for options in ({"start_weight": 0.0}, {"weight_factor": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ReMoEOptions(**options)
    counts = ReMoEOptions().counts(16, 8, 2)
    assert (counts.params, counts.flops_per_token, counts.expected_experts) == (128, 256, 2)
    assert counts.measured
