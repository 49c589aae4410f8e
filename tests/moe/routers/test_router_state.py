"""Routers with state: micro-batches add up to the batch, layers stack, and jit really moves it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe import MoEConfig
from moejax.moe.layer import MoELayer
from moejax.moe.routers import REGISTRY, RouterInputs

STATEFUL = (
    "deepseek_v3", "loss_free", "centred_bias", "smebu", "quantile", "remoe", "expert_threshold",
    "longcat", "default_vector",
)  # fmt: skip
# They choose by their state, so the second of two equal batches is routed in another way.
ROWS, LENGTH, WIDTH, EXPERTS = 4, 16, 8, 8


@pytest.fixture(scope="module", params=STATEFUL)
def moved(request):
    """A router, its state, and statistics of a batch whole and in two unequal halves."""
    options = REGISTRY[request.param].Options()
    config = MoEConfig(EXPERTS, 2, 8, router=options, dispatch="dense_loop")
    layer = MoELayer(config)
    x = 2 * jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH)) + 0.5
    valid = jnp.asarray(np.arange(LENGTH)[None] < np.array([[16], [16], [9], [1]]))
    tokens = jnp.arange(ROWS * LENGTH, dtype=jnp.int32).reshape(ROWS, LENGTH)
    whole = RouterInputs(x, valid, tokens, train=True)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), whole)
    initial = jax.jit(layer.init)(jax.random.key(0), whole)["router_state"]
    variables = {**tiny.draw(shapes), "router_state": initial}

    def stats(*inputs):
        out = layer.apply(
            variables, RouterInputs(*inputs, train=True), rngs={"router": jax.random.key(1)}
        )
        return out.stats

    run = jax.jit(stats)
    half = lambda part: run(x[part], valid[part], tokens[part])
    parts = jax.tree.map(jnp.add, half(slice(0, 2)), half(slice(2, 4)))
    router = layer.make_router(config, parent=None)
    return router, initial["router"], run(x, valid, tokens), parts, jax.jit(router.update)


def test_every_router_with_state_is_here():
    found = set()
    for name, kind in REGISTRY.items():
        if name == "trace":
            continue
        options = kind.Options()
        needs = dict(gate_rank=2 if options.needs_gate_rank else 0, allow_leak=options.leaks)
        for top_k in (2, 1):
            try:
                config = MoEConfig(EXPERTS, top_k, 8, router=options, **needs)
                break
            except ConfigError:
                continue
        else:
            pytest.fail(f"{name} takes neither two experts a token nor one")
        inputs = RouterInputs(
            jnp.ones((1, 4, WIDTH)), jnp.ones((1, 4), bool), jnp.ones((1, 4), jnp.int32)
        )
        if "router_state" in jax.eval_shape(MoELayer(config).init, jax.random.key(0), inputs):
            found.add(name)
    same = {"deepseek_v4", "kimi_k2", "ernie"}  # deepseek_v3's rule
    assert found - same == set(STATEFUL)


def test_it_moves_under_jit(moved):
    _, state, whole, _, update = moved
    new = update(state, whole)
    assert jax.tree.structure(new) == jax.tree.structure(dict(state))
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (new, dict(state))), strict=True)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_micro_batches_move_it_as_one_batch_does(moved):
    _, state, whole, parts, update = moved
    tiny.assert_trees_close(update(state, parts), update(state, whole), 1e-6)


def test_stacked_layers_move_each_by_its_own_sums(moved):
    _, state, whole, _, update = moved
    other = {**whole, "load": whole["load"][::-1]}
    stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    both = update(stack(dict(state), dict(state)), stack(whole, other))
    for i, stats in enumerate((whole, other)):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], both)
        tiny.assert_trees_close(one, update(state, stats), 1e-6)


def test_a_step_without_tokens_leaves_it_finite(moved):
    _, state, whole, _, update = moved
    new = update(state, jax.tree.map(jnp.zeros_like, whole))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_the_bias_stops_where_the_options_say():
    kind = REGISTRY["deepseek_v3"]
    router = kind(dataclasses.replace(kind.Options(), bias_stop_step=1), 4, 2)
    state = router.options.rule.initial(4)
    stats = {"load": jnp.array([4.0, 0.0, 0.0, 0.0])}
    one = router.update(state, stats)
    assert np.any(one["bias"])
    np.testing.assert_array_equal(router.update(one, stats)["bias"], one["bias"])
