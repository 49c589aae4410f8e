"""Schedules by hand, clipping, what weight decay and Muon take, and Muon's update in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from optax.contrib import MuonDimensionNumbers

from moejax.config import ConfigError
from moejax.training.optimizers import (
    OptimConfig,
    decay_mask,
    learning_rate,
    make_optimizer,
    muon_dimensions,
    muon_labels,
    state_bytes,
)


def rates(steps, **options):
    schedule = learning_rate(OptimConfig(learning_rate=1.0, **options), steps)
    return lambda step: float(schedule(step))


def test_cosine_by_hand():
    # 10 steps of warm-up, then 90 down to 0.1. Half way the cosine is 0: 0.1 + 0.9 / 2 = 0.55.
    at = rates(100, schedule="cosine", warmup_steps=10, final_fraction=0.1)
    wanted = {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1, 200: 0.1}
    assert {step: pytest.approx(at(step), abs=1e-6) for step in wanted} == wanted


def test_wsd_by_hand():
    # Warm-up to 10, constant to 80, then linearly to 0.1 at 100: half way 0.55.
    options = {"warmup_steps": 10, "decay_fraction": 0.2, "final_fraction": 0.1}
    at = rates(100, schedule="wsd", **options)
    wanted = {0: 0.0, 5: 0.5, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 200: 0.1}
    assert {step: pytest.approx(at(step), abs=1e-6) for step in wanted} == wanted


def test_wsd_reaches_its_end_although_the_warm_up_takes_part_of_the_decay():
    # A warm-up of 8 of 10 steps leaves 2 of the decay's 5: 1, 0.5, 0.
    options = {"warmup_steps": 8, "decay_fraction": 0.5, "final_fraction": 0.0}
    at = rates(10, schedule="wsd", **options)
    assert [at(8), at(9), at(10)] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_no_warm_up_starts_at_the_peak_and_a_short_run_never_passes_it(schedule):
    assert rates(10, schedule=schedule, warmup_steps=0)(0) == 1.0
    at = rates(5, schedule=schedule, warmup_steps=100)
    assert [at(step) for step in range(5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_no_decay_keeps_the_peak():
    at = rates(10, schedule="wsd", warmup_steps=0, decay_fraction=0.0)
    assert at(9) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.0}, {"warmup_steps": -1}, {"decay_fraction": 1.5}, {"clip_norm": -1.0},
        {"final_fraction": -0.1}, {"beta1": 1.0}, {"beta2": -0.1}, {"momentum": 1.0},
        {"weight_decay": -0.1},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError) as error:
        OptimConfig(**options)
    assert error.value.field == f"optim.{next(iter(options))}"


@pytest.fixture(scope="module")
def params():
    return tiny.variables(tiny.moe_config())["params"]


def paths(tree, is_leaf=None):
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {"/".join(part.key for part in path): leaf for path, leaf in leaves}


def test_muon_takes_the_matrices_of_layers_and_experts(params):
    labels = paths(muon_labels(params))
    taken = {path for path, label in labels.items() if label == "muon"}
    attention = [f"attention/{name}/kernel" for name in ("query", "key", "value", "out")]
    dense = ["ffn/gate_up", "ffn/down"]
    moe = [f"moe/{part}/{name}" for part in ("experts", "shared") for name in ("gate_up", "down")]
    assert taken == {f"segment_0/layer_0/{name}" for name in attention + dense} | {
        f"segment_1/layer_0/{name}" for name in attention + moe
    }
    # AdamW keeps embedding, head, norms (which a scan stacks into matrices) and the router.
    rest = labels.keys() - taken
    assert {"embedding", "head", "final_norm/scale"} <= rest
    assert "segment_1/layer_0/moe/router/kernel" in rest
    assert "segment_1/layer_0/ffn_norm/scale" in rest


def test_muon_takes_the_matrices_of_mtp_modules():
    params = tiny.variables(tiny.moe_config(num_layers=1, first_k_dense=0, mtp_depth=1))["params"]
    labels, sizes = paths(muon_labels(params)), paths(
        muon_dimensions(params), lambda leaf: leaf is None or hasattr(leaf, "output_axis")
    )  # fmt: skip
    assert labels["mtp_0/projection/kernel"] == "muon"
    assert sizes["mtp_0/projection/kernel"] == MuonDimensionNumbers((0,), (1,))
    names = ("hidden_norm", "embedding_norm", "final_norm")
    assert {labels[f"mtp_0/{name}/scale"] for name in names} == {"adamw"}
    of = lambda part: {n.split("/", 1)[1]: v for n, v in labels.items() if n.startswith(part + "/")}
    assert of("mtp_0_layer") == of("segment_0")


def test_muon_leaves_expert_biases_to_adamw():
    # A scan stacks them into (repeats, E, ...), and (E, D) looks like a matrix: it is none.
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    experts = {name: jnp.zeros((2, 8, 4, 4)) for name in names}
    params = {"segment_0": {"layer_0": {"moe": {"experts": experts}}}}
    labels = {path.split("/")[-1]: label for path, label in paths(muon_labels(params)).items()}
    assert labels == {
        "gate_up": "muon", "down": "muon", "gate_up_bias": "adamw", "down_bias": "adamw",
    }  # fmt: skip


def test_muon_matrices_are_a_layers_and_an_experts_own(params):
    # (repeats, experts, D, gate or up, F): only D and F are the matrix; all else is a batch.
    found = paths(
        muon_dimensions(params), lambda leaf: leaf is None or hasattr(leaf, "output_axis")
    )
    at = lambda name: (tuple(found[name].reduction_axis), tuple(found[name].output_axis))
    layer = "segment_1/layer_0/"
    assert at(layer + "moe/experts/gate_up") == ((2,), (4,))
    assert at(layer + "moe/experts/down") == ((2,), (3,))
    assert at(layer + "moe/shared/gate_up") == ((1,), (3,))
    assert at(layer + "moe/shared/down") == ((1,), (2,))
    assert at("segment_0/layer_0/ffn/gate_up") == ((1,), (3,))
    assert at(layer + "attention/query/kernel") == ((1,), (2, 3))
    assert at(layer + "attention/out/kernel") == ((1, 2), (3,))
    assert found[layer + "moe/router/kernel"] is None and found["embedding"] is None


def test_muon_takes_latent_attentions_matrices_but_no_bias_and_no_norm():
    # (repeats, inputs, outputs); heads and their channels are outputs together.
    attention = tiny.AttentionConfig(
        4, kind="mla", q_lora_rank=12, kv_lora_rank=8, nope_head_dim=6, rope_head_dim=4,
        v_head_dim=5, bias="all",
    )  # fmt: skip
    params = tiny.variables(tiny.dense_config(attention=attention))["params"]
    params = params["segment_0"]["layer_0"]["attention"]
    found = paths(
        muon_dimensions(params), lambda leaf: leaf is None or hasattr(leaf, "output_axis")
    )
    got = {
        path: (tuple(axes.reduction_axis), tuple(axes.output_axis))
        for path, axes in found.items() if axes is not None
    }  # fmt: skip
    assert got == {
        "query_down/kernel": ((1,), (2,)), "query_up/kernel": ((1,), (2, 3)),
        "kv_down/kernel": ((1,), (2,)), "kv_up/kernel": ((1,), (2, 3)),
        "out/kernel": ((1, 2), (3,)),
    }  # fmt: skip
    taken = {path for path, label in paths(muon_labels(params)).items() if label == "muon"}
    assert taken == got.keys()
    decayed = {path for path, kept in paths(decay_mask(params)).items() if kept}
    assert decayed == got.keys()


def test_biases_and_sinks_are_adamws_and_do_not_decay():
    attention = tiny.AttentionConfig(4, 2, qk_norm="head", bias="all", sinks=True)
    config = tiny.moe_config("gpt_oss", attention=attention)
    params = tiny.variables(config)["params"]
    for path, decays in paths(decay_mask(params)).items():
        name = path.split("/")[-1]
        assert decays == (name not in ("scale", "sinks") and not name.endswith("bias")), path
    labels = paths(muon_labels(params))
    layer = "segment_1/layer_0/attention/"
    for name in ("query/bias", "key/bias", "value/bias", "out/bias", "sinks", "key_norm/scale"):
        assert labels[layer + name] == "adamw", name


def newton_schulz(matrix):
    """Five quintic steps with Muon's coefficients (Jordan 2024), on one matrix in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def run_optimizer(config, params, gradients, steps=100):
    optimizer = make_optimizer(config, steps)
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    return update(gradients, params)


def test_muons_update_is_newton_schulz_of_each_matrix():
    shape = (2, 3, 8, 2, 6)
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=shape)
    # Matrices of very different size: were they orthogonalised together, the small would vanish.
    gradient *= 10.0 ** rng.uniform(-3, 0, (2, 3, 1, 2, 1))
    nest = lambda leaf: {"segment_0": {"moe": {"experts": {"gate_up": leaf}}}}
    params = nest(jnp.asarray(rng.normal(size=shape), jnp.float32))
    config = OptimConfig(
        optimizer="muon", learning_rate=0.5, warmup_steps=0, weight_decay=0.1, clip_norm=0.0
    )
    updates = run_optimizer(config, params, nest(jnp.asarray(gradient, jnp.float32)))
    update = np.asarray(updates["segment_0"]["moe"]["experts"]["gate_up"], np.float64)
    weight = np.asarray(params["segment_0"]["moe"]["experts"]["gate_up"], np.float64)
    for layer, expert, side in np.ndindex(2, 3, 2):
        at = (layer, expert, slice(None), side)
        # Moonlight, eq. 4: 0.2 · sqrt(max(D, F)) gives AdamW's usual size; then the decay.
        direction = newton_schulz(gradient[at])
        wanted = -0.5 * (0.2 * 8**0.5 * direction + 0.1 * weight[at])
        assert tiny.relative_error(update[at], wanted) < 1e-3
        singular = np.linalg.svd((update[at] / -0.5 - 0.1 * weight[at]) / (0.2 * 8**0.5))[1]
        # Newton–Schulz leaves singular values between about 0.7 and 1.2.
        assert singular.min() > 0.5 and singular.max() < 1.3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_takes_everything_but_norms_biases_and_sinks(optimizer):
    # With no gradient an update is -rate · decay · weight, or nothing.
    scale = {"scale": jnp.ones((2, 4))}
    attention = {"sinks": jnp.ones((2, 4)), "out": {"bias": jnp.ones((2, 4))}}
    layer = {
        "attention": attention,
        "ffn_norm": scale,
        "moe": {"experts": {"down": jnp.ones((2, 3, 4, 5))}},
    }
    params = {"embedding": jnp.ones((8, 4)), "layer_0": layer, "final_norm": scale}
    config = OptimConfig(optimizer=optimizer, learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = paths(run_optimizer(config, params, zeros))
    for path, weight in paths(params).items():
        factor = 0.0 if path.endswith(("scale", "sinks", "bias")) else -0.05
        np.testing.assert_allclose(updates[path], factor * weight, rtol=1e-5, err_msg=path)
    assert not decay_mask(params)["final_norm"]["scale"] and decay_mask(params)["embedding"]


def test_adamw_by_hand():
    # First step, after bias correction: gradient over its own size, plus 0.1 · weight.
    config = OptimConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1, clip_norm=0.0)
    params = {"embedding": jnp.array([2.0, 2.0])}
    updates = run_optimizer(config, params, {"embedding": jnp.array([3.0, -0.01])})
    np.testing.assert_allclose(updates["embedding"], [-0.5 * 1.2, 0.5 * 0.8], rtol=1e-5)


def test_clipping_scales_by_the_global_norm():
    # Norm of (3, 4) is 5; clipped to 1 it is (0.6, 0.8). Adam's first moment keeps 0.1 of it.
    optimizer = make_optimizer(OptimConfig(clip_norm=1.0), 10)
    params = {"embedding": jnp.ones(1), "head": jnp.ones(1)}
    gradients = {"embedding": jnp.array([3.0]), "head": jnp.array([4.0])}
    state = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[1])(gradients, params)
    moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moment["embedding"], [0.06], rtol=1e-5)
    np.testing.assert_allclose(moment["head"], [0.08], rtol=1e-5)


def test_adamws_moments_in_bfloat16_are_rounded_between_steps_only():
    rng = np.random.default_rng(0)
    draw = lambda: {"embedding": rng.normal(size=(8, 4)).astype(np.float32)}
    params, gradients = draw(), [draw(), draw()]
    config = OptimConfig(
        learning_rate=0.5, warmup_steps=0, clip_norm=0.0, weight_decay=0.0, moments_dtype="bfloat16"
    )
    assert state_bytes(config) == 4 and state_bytes(OptimConfig()) == 8
    optimizer = make_optimizer(config, 1000)
    state = jax.jit(optimizer.init)(params)
    kept = lambda state: [a for a in jax.tree.leaves(state) if a.shape]
    assert [a.dtype for a in kept(state)] == [jnp.bfloat16] * 2
    round_down = lambda values: np.asarray(jnp.asarray(values, jnp.bfloat16), np.float64)
    mu = nu = np.zeros((8, 4))
    for step, gradient in enumerate(gradients, 1):
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        g = gradient["embedding"].astype(np.float64)
        mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g**2
        wanted = -0.5 * (mu / (1 - 0.9**step)) / (np.sqrt(nu / (1 - 0.95**step)) + 1e-8)
        assert tiny.relative_error(updates["embedding"], wanted) < 1e-4
        mu, nu = round_down(mu), round_down(nu)
        for got, moment in zip(kept(state), (mu, nu), strict=True):
            # A sum on the edge between two numbers of bfloat16 may fall to either side.
            assert np.mean(np.asarray(got, np.float64) != moment) < 0.1


def test_muons_rest_keeps_its_moments_so_as_well(params):
    config = OptimConfig(optimizer="muon", moments_dtype="bfloat16")
    state = jax.eval_shape(make_optimizer(config, 100).init, params)
    kinds = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape]
    assert jnp.dtype("bfloat16") in kinds and jnp.dtype("float32") in kinds
