"""A look into routers from outside: what is captured, and what masking changes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.analysis import probe, routing
from moejax.models import Transformer
from moejax.moe import MoEConfig, router_options
from moejax.moe.layer import MoELayer
from moejax.moe.routers import (
    DeepSeekV3Router,
    RouterInputs,
    Routing,
    SoftmaxTopKRouter,
    registry,
)
from moejax.moe.routers.rows import GatheredRows, MixedRows, TokenRows
from moejax.parallel import axis_rules


def decision(expert, rows):
    expert = jnp.array(expert, jnp.int32)
    return Routing(expert, jnp.ones(expert.shape), jnp.zeros(()), {}, rows)


def test_chosen_experts_of_tokens():
    # Token 1 has one expert only, token 2 none: 3 is no expert.
    chosen = probe.chosen_experts(decision([[0, 2], [1, 3], [3, 3]], TokenRows()), 3, 3)
    np.testing.assert_array_equal(chosen, [[1, 0, 1], [0, 1, 0], [0, 0, 0]])


def test_chosen_experts_of_gathered_rows():
    # Two groups of two tokens, two rows each. Rows 0 and 1 are both token 1 (for experts 0 and 1);
    # row 2 is token 2 + 0 for expert 0, row 3 is for none.
    rows = GatheredRows(jnp.array([[1, 1], [0, 1]]))
    chosen = probe.chosen_experts(decision([[0], [1], [0], [2]], rows), 4, 2)
    np.testing.assert_array_equal(chosen, [[0, 0], [1, 1], [1, 0], [0, 0]])


class Wrapped(SoftmaxTopKRouter):
    """A router that calls its base class's own call."""

    def __call__(self, inputs):
        return super().__call__(inputs)


X = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)


@functools.cache
def program(router_class, name):
    """The jitted routing of 12 tokens over 6 experts, K 2, and what masking said of it."""
    router = router_class(router_options({"name": name}), 6, 2)
    said = {}

    @jax.jit
    def run(variables, number):
        inputs = RouterInputs(jnp.array(X), jnp.ones(X.shape[:2], bool))
        with probe.masking(number) as done:
            decided = router.apply(variables, inputs)
        said.update(done)
        return decided

    return run, said


def route(number, router_class=SoftmaxTopKRouter, bias=None, name="softmax_topk"):
    """Logits, the routing with ``number`` experts masked, and whether that was possible."""
    kernel = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    variables = {"params": {"kernel": jnp.array(kernel)}}
    if bias is not None:
        variables["router_state"] = {"bias": jnp.array(bias)}
    run, said = program(router_class, name)
    decided = run(variables, number)
    return X.reshape(12, 8) @ kernel, decided, said["possible"]


@pytest.mark.parametrize("router_class", [SoftmaxTopKRouter, Wrapped])
@pytest.mark.parametrize("number", [0, 1, 4])
def test_the_next_best_take_the_place_of_masked_experts(number, router_class):
    # Of six experts in the order of their logits, the ``number`` best are out and the next two in.
    logits, decided, possible = route(number, router_class)
    order = np.argsort(-logits, axis=-1)
    expected = np.zeros_like(logits, bool)
    np.put_along_axis(expected, order[:, number : number + 2], True, axis=1)
    np.testing.assert_array_equal(probe.chosen_experts(decided, 12, 6), expected)
    assert not (expected & routing.best_choices(logits, number)).any()
    assert possible


def test_the_traced_order_is_the_one_of_numpy():
    logits = np.round(np.random.default_rng(2).normal(size=(40, 6)), 1)  # with ties
    for number in (0, 1, 3, 6):
        expected = routing.best_choices(logits, number)
        np.testing.assert_array_equal(probe._best(jnp.array(logits), number), expected)


def test_a_masked_expert_that_its_bias_lifts_is_taken_out():
    # A bias of 9 puts expert 0 into every choice, sigmoid scores being below 1. Where expert 0 is
    # also the best by its logit it is masked, and the token is left with one expert of its two.
    bias = np.array([9.0, 0, 0, 0, 0, 0], np.float32)
    logits, decided, _ = route(1, DeepSeekV3Router, bias, "deepseek_v3")
    chosen = np.asarray(probe.chosen_experts(decided, 12, 6))
    best = logits.argmax(axis=-1)
    assert (best == 0).any() and (best != 0).any()
    np.testing.assert_array_equal(chosen.sum(axis=-1), np.where(best == 0, 1, 2))
    np.testing.assert_array_equal(chosen[:, 0], best != 0)
    assert not chosen[np.arange(12), best].any()
    assert np.all(np.asarray(decided.gate)[np.asarray(decided.expert) == 6] == 0)


class Mixing(SoftmaxTopKRouter):
    """A router whose rows are mixtures of tokens."""

    def __call__(self, inputs):
        batch, length = inputs.valid.shape
        weights = jnp.ones((batch, length, length)) / length
        return super().__call__(inputs).replace(rows=MixedRows(weights, weights))


def test_rows_that_are_no_tokens_cannot_be_masked():
    assert not route(1, Mixing)[2]


# Whole models.

CONFIG = tiny.moe_config("deepseek_v3")
BATCH = {
    name: getattr(tiny.batch(), name)[0]
    for name in ("tokens", "targets", "segment_ids", "positions")
}


@pytest.fixture(scope="module")
def variables():
    return tiny.variables(CONFIG)


@pytest.fixture(scope="module")
def reference(variables):
    """Gradient of the loss, the loss and the model's outputs, all from its logits."""

    def objective(params):
        with axis_rules():
            out = Transformer(CONFIG).apply(
                {**variables, "params": params},
                BATCH["tokens"],
                BATCH["segment_ids"],
                BATCH["positions"],
            )
        right = jnp.take_along_axis(out.logits, BATCH["targets"][..., None], axis=-1)[..., 0]
        real = BATCH["segment_ids"] > 0
        nll = jnp.sum(jnp.where(real, jax.nn.logsumexp(out.logits, axis=-1) - right, 0.0))
        return nll / jnp.sum(real), (nll, out)

    return jax.jit(jax.grad(objective, has_aux=True))(variables["params"])


@pytest.fixture(scope="module")
def seen(variables):
    sample = jnp.arange(BATCH["tokens"].size)
    return [probe.observe(CONFIG, variables, BATCH, sample, masked) for masked in (0, 2)]


def test_looking_changes_nothing(seen, reference):
    _, (nll, out) = reference
    np.testing.assert_allclose(seen[0].nll, nll, rtol=1e-5)
    assert seen[0].targets == (BATCH["segment_ids"] > 0).sum()
    np.testing.assert_array_equal(seen[0].prediction, out.logits.argmax(axis=-1))
    tiny.assert_trees_close(seen[0].router_stats, out.router_stats, 1e-6)


def test_what_is_captured_is_what_the_layers_did(seen, variables):
    real = np.asarray(BATCH["segment_ids"]).reshape(-1) > 0
    layer = seen[0].layers["segment_1"]["layer_0"]
    chosen = np.asarray(layer["chosen"])
    assert chosen.shape == (2, real.size, 8)
    np.testing.assert_array_equal(chosen.sum(axis=-1), np.where(real, 2, 0)[None].repeat(2, 0))
    load = seen[0].router_stats["segment_1"]["layer_0"]["load"]
    np.testing.assert_array_equal(chosen.sum(axis=1), load)


def test_masking_reaches_every_layer_of_a_scanned_model(seen, variables):
    # By each layer's own input and matrix: with 0 masked, tokens run through their best experts;
    # with 2, never, and mostly through two others.
    kernel = variables["params"]["segment_1"]["layer_0"]["moe"]["router"]["kernel"]
    real = np.asarray(BATCH["segment_ids"]).reshape(-1) > 0
    for number, one in ((0, seen[0]), (2, seen[1])):
        layer = one.layers["segment_1"]["layer_0"]
        for i in range(2):
            logits = np.asarray(layer["sample"][i] @ kernel[i])
            overlap = (np.asarray(layer["chosen"][i]) & routing.best_choices(logits, 2))[real]
            assert overlap.mean() * 8 > 1.5 if number == 0 else not overlap.any()
    chosen = np.asarray(seen[1].layers["segment_1"]["layer_0"]["chosen"])[:, real]
    assert 1.9 < chosen.sum(axis=-1).mean() <= 2
    assert seen[1].nll != seen[0].nll


def test_which_models_can_be_masked(monkeypatch):
    config = tiny.moe_config("softmax_topk")
    assert probe.can_mask(config, tiny.shapes(config), BATCH)
    monkeypatch.setitem(registry.REGISTRY, "softmax_topk", Mixing)
    assert not probe.can_mask(config, tiny.shapes(config), BATCH)


def test_gradients_are_those_of_the_loss(variables, reference):
    grads = probe.router_gradients(CONFIG, variables, BATCH, jnp.array([1.0, 0.0]))
    path = ("segment_1", "layer_0", "moe", "router", "kernel")
    assert list(grads) == [path]
    full, _ = reference
    for name in path:
        full = full[name]
    assert tiny.relative_error(grads[path], full) < 1e-5
    auxiliary = probe.router_gradients(CONFIG, variables, BATCH, jnp.array([0.0, 1.0]))[path]
    both = probe.router_gradients(CONFIG, variables, BATCH, jnp.array([1.0, 1.0]))[path]
    assert np.any(auxiliary) and tiny.relative_error(auxiliary + full, both) < 1e-4


GPT_OSS = {"expert_bias": True, "activation": "clamped_swiglu"}


@pytest.mark.parametrize("options", [{}, {"latent_dim": 4}, {"gate_rank": 3}, GPT_OSS])
def test_outputs_of_all_experts(options):
    # Against a loop in float64: silu(x W_gate) · (x W_up), then W_down, between the latent matrices
    # where there are some.
    config = tiny.dense_config(moe=MoEConfig(3, 2, 5, **options), num_layers=1)
    params = nn.meta.unbox(tiny.variables(config)["params"])["segment_0"]["layer_0"]["moe"]
    layer = jax.tree.map(lambda leaf: leaf[0], params)
    x = np.random.default_rng(3).normal(size=(4, 16)).astype(np.float32)
    got = probe.expert_outputs(config, layer, jnp.array(x))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layer)
    own, rows = wide["experts"], x.astype(np.float64)
    if "latent_in" in wide:
        rows = rows @ wide["latent_in"]
    for i in range(3):
        if "gate_in" in own:
            gate, up = rows @ own["gate_in"][i] @ own["gate_out"][i], rows @ own["up"][i]
        else:
            gate, up = rows @ own["gate_up"][i, :, 0], rows @ own["gate_up"][i, :, 1]
        if "gate_up_bias" in own:
            # Within gpt-oss's limits of 7, which these numbers do not reach.
            gate, up = gate + own["gate_up_bias"][i, 0], up + own["gate_up_bias"][i, 1]
            assert max(np.abs(gate).max(), np.abs(up).max()) < 7
            y = (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) @ own["down"][i]
            y += own["down_bias"][i]
        else:
            y = (gate / (1 + np.exp(-gate)) * up) @ own["down"][i]
        y = y @ wide["latent_out"] if "latent_out" in wide else y
        assert tiny.relative_error(got[i], y) < 1e-5


def test_outputs_of_all_experts_in_fp8_are_those_of_the_layer():
    moe = MoEConfig(3, 3, 5, router=router_options({"name": "softmax_topk"}))
    config = tiny.dense_config(moe=moe, num_layers=1, precision="fp8")
    params = nn.meta.unbox(tiny.variables(config)["params"])["segment_0"]["layer_0"]["moe"]
    layer = jax.tree.map(lambda leaf: leaf[0], params)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 16)), jnp.float32)
    got = probe.expert_outputs(config, layer, x)
    native = probe.expert_outputs(dataclasses.replace(config, precision="native"), layer, x)
    assert 1e-3 < tiny.relative_error(got, native) < 0.1
    # All experts are chosen, so that the layer's output is theirs weighted by the gates.
    inputs = RouterInputs(x[None], jnp.ones((1, 4), bool))
    y = MoELayer(moe, precision="fp8").apply({"params": layer}, inputs).y[0]
    gates = jax.nn.softmax(x @ layer["router"]["kernel"], axis=-1)
    # The layer quantises activations times gates, here once each, so that both round otherwise.
    assert tiny.relative_error(jnp.einsum("te,etd->td", gates, got), y) < 0.03
