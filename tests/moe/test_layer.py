"""The MoE layer: shared experts, dispatchers that agree, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moejax.config import ConfigError
from moejax.moe.experts import SwiGLU
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs
from moejax.parallel import AXES

VALID = jnp.asarray(np.arange(8)[None] < np.array([[8], [5]]))


def config(dispatch="blocks", **moe):
    moe = {"num_shared_experts": 2, "capacity_factor": 8.0, **moe}
    return tiny.moe_config(dispatch=dispatch, moe=moe).moe


@functools.cache
def compiled(config):
    def run(variables, x, valid):
        out = MoELayer(config).apply(variables, RouterInputs(x, valid))
        return out.y, out.aux_loss, out.stats

    return jax.jit(run)


@pytest.fixture(scope="module")
def layer():
    """Variables, inputs and a jitted run of the layer under a config."""
    x = jax.random.normal(jax.random.key(1), (2, 8, 16))
    variables = tiny.draw(
        jax.eval_shape(MoELayer(config()).init, jax.random.key(0), RouterInputs(x, VALID))
    )

    def run(config, variables=variables):
        return compiled(config)(variables, x, VALID)

    return variables, x, run


def test_dispatchers_agree(layer):
    _, _, run = layer
    wanted = run(config("dense_loop"))
    for name in ("blocks", "capacity"):
        tiny.assert_trees_close(run(config(name)), wanted, 1e-5)


def test_shared_experts_are_one_wide_one_added(layer):
    variables, x, run = layer
    params = dict(variables["params"])
    shared = params.pop("shared")
    assert shared["gate_up"].shape == (16, 2, 2 * 8)
    alone = run(config(num_shared_experts=0), {**variables, "params": params})[0]
    added = jax.jit(SwiGLU(16).apply)({"params": shared}, x)
    assert tiny.relative_error(alone + added, run(config())[0]) < 1e-6
    # Padding goes through the shared experts alone.
    assert not np.any(np.asarray(alone)[~np.asarray(VALID)])


def test_drops_are_counted_and_padding_is_not_among_them(layer):
    _, _, run = layer
    # One slot an expert and row, 8 experts: at most 16 of the 26 assignments find one.
    _, _, stats = run(config("capacity", capacity_factor=0.01))
    assert float(stats["assignments"]) == 2 * 13
    load = float(stats["assignments"])
    assert load - 16 <= float(stats["dropped"]) < load


def test_a_leaking_policy_reaches_the_drops(layer):
    # One slot an expert and sequence: who keeps it depends on the policy.
    _, _, run = layer
    few = dict(capacity_factor=0.5, allow_leak=True)
    by_position, _, first = run(config("capacity", **few))
    by_choice, _, second = run(config("capacity", drop_policy="choice", **few))
    assert float(first["dropped"]) > 0 and float(second["dropped"]) > 0
    assert tiny.relative_error(by_choice, by_position) > 1e-3


def test_a_back_end_that_cannot_run_here_is_an_error_not_a_fall_back(layer):
    _, _, run = layer
    with pytest.raises(ConfigError, match=r"moe.dispatch.*needs? a GPU"):
        run(config("grouped"))
    with pytest.raises(ConfigError, match=r"moe.exchange.*on cpu"):
        run(config(exchange="ragged_all_to_all"))


def test_statistics_are_the_same_tree_whatever_runs(layer):
    _, _, run = layer
    trees = [jax.tree.structure(run(config(name))[2]) for name in ("blocks", "capacity")]
    assert trees[0] == trees[1]
    # One device holds all experts: every valid token reaches that one, and sends nothing.
    stats = run(config())[2]
    assert float(stats["devices_touched"]) == float(stats["nodes_touched"]) == 13
    sent = ("rows_sent", "rows_sent_out", "bytes_sent", "bytes_sent_out")
    for name in (*sent, "exchange_overflow", "exchange_dropped", "dropped"):
        assert float(stats[name]) == 0, name


def test_on_gpus_auto_lowers_to_grouped_products_and_ragged_exchange(layer):
    """Forward and backward for eight H100s, on a machine that has none."""
    variables, _, _ = layer
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1, 2, 4, 1, 1), AXES, (AxisType.Auto,) * 5, abstract_device=device)
    x = jax.ShapeDtypeStruct((8, 8, 16), jnp.bfloat16)

    def objective(params, x):
        valid = jnp.ones(x.shape[:2], bool)
        inputs = RouterInputs(x, valid)
        y = MoELayer(config("auto")).apply({**variables, "params": params}, inputs).y
        return jnp.sum(y.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(objective, (0, 1))).trace(variables["params"], x)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@ragged_all_to_all(") >= 6
    # Gate and up, and down, each with its input gradient and its weight gradient.
    assert program.count("triton") >= 6


def draw(config):
    """Random variables of a layer, and a jitted run of it."""
    x = jax.random.normal(jax.random.key(1), (2, 8, 16))
    variables = jax.eval_shape(MoELayer(config).init, jax.random.key(0), RouterInputs(x, VALID))
    return tiny.draw(variables), lambda variables: compiled(config)(variables, x, VALID), x


def test_a_latent_space_of_full_width_between_unit_matrices_is_the_plain_layer(layer):
    variables, _, run = layer
    wide = config(latent_dim=16)
    _, of_latent, _ = draw(wide)
    params = {**variables["params"], "latent_in": jnp.eye(16), "latent_out": jnp.eye(16)}
    got = of_latent({**variables, "params": params})
    tiny.assert_trees_close(got, run(config()), 1e-5)


def test_a_latent_space_narrows_the_experts_alone():
    variables, run, x = draw(config(latent_dim=4))
    params = variables["params"]
    assert params["experts"]["gate_up"].shape == (8, 4, 2, 8)
    assert params["experts"]["down"].shape == (8, 8, 4)
    assert params["router"]["kernel"].shape == (16, 8)
    assert params["shared"]["gate_up"].shape == (16, 2, 16)
    # By hand: project, run the plain layer of width 4 with the same routing, project back.
    narrow = {**params, "latent_out": params["latent_out"] * 2}
    apart = lambda params: (
        run({**variables, "params": params})[0]
        - jax.jit(SwiGLU(16).apply)({"params": params["shared"]}, x)
    )
    np.testing.assert_allclose(apart(narrow), 2 * apart(params), rtol=1e-4, atol=1e-5)


def test_a_gate_of_two_factors_is_their_product(layer):
    _, _, run = layer
    variables, of_factors, _ = draw(config(gate_rank=4))
    experts = variables["params"]["experts"]
    assert {name: leaf.shape for name, leaf in experts.items()} == {
        "gate_in": (8, 16, 4), "gate_out": (8, 4, 8), "up": (8, 16, 8), "down": (8, 8, 16),
    }  # fmt: skip
    gate = np.einsum("edr,erf->edf", experts["gate_in"], experts["gate_out"])
    whole = {"gate_up": jnp.stack([jnp.asarray(gate), experts["up"]], 2), "down": experts["down"]}
    params = {**variables["params"], "experts": whole}
    tiny.assert_trees_close(
        of_factors(variables), run(config(), {**variables, "params": params}), 1e-5
    )


def test_a_gated_shared_expert_is_scaled_by_a_sigmoid(layer):
    _, _, run = layer
    variables, gated, x = draw(config(shared_gate=True))
    params = dict(variables["params"])
    kernel = params.pop("shared_gate")
    plain = run(config(), {**variables, "params": params})[0]
    shared = jax.jit(SwiGLU(16).apply)({"params": params["shared"]}, x)
    factor = 1 / (1 + np.exp(-(np.asarray(x) @ np.asarray(kernel))))
    wanted = np.asarray(plain) + (factor - 1) * np.asarray(shared)
    assert tiny.relative_error(gated(variables)[0], wanted) < 1e-5


GPT_OSS = dict(expert_bias=True, activation="clamped_swiglu")


@pytest.mark.parametrize("more", [{}, {"latent_dim": 4, "gate_rank": 3}])
def test_expert_forms_go_with_latent_spaces_low_rank_gates_and_shared_experts(more):
    variables, run, x = draw(config(**GPT_OSS, **more))
    params, width = variables["params"], more.get("latent_dim", 16)
    experts = params["experts"]
    assert experts["gate_up_bias"].shape == (8, 2, 8) and experts["down_bias"].shape == (8, width)
    assert set(params["shared"]) == {"gate_up", "down"}
    reference = compiled(config("dense_loop", **GPT_OSS, **more))
    tiny.assert_trees_close(run(variables)[0], reference(variables, x, VALID)[0], 1e-5)
    # All but the last biases taken away: tokens get those, and padding does not.
    zeros = jax.tree.map(jnp.zeros_like, params)
    kept = {name: leaf for name, leaf in params.items() if "latent" in name or name == "router"}
    only = {**zeros["experts"], "down_bias": experts["down_bias"]}
    y = run({**variables, "params": {**zeros, **kept, "experts": only}})[0]
    given = np.any(np.asarray(y), axis=-1)
    np.testing.assert_array_equal(given, np.asarray(VALID))


def test_a_router_that_runs_the_experts_sees_their_biases():
    # It sums each expert's outputs over its tokens: one more in the bias is one more a token.
    moe = tiny.moe_config(router="default_vector", moe=GPT_OSS).moe
    inputs = RouterInputs(jax.random.normal(jax.random.key(1), (2, 8, 16)), VALID, train=True)
    variables = tiny.draw(jax.eval_shape(MoELayer(moe).init, jax.random.key(0), inputs))
    run = jax.jit(lambda variables: MoELayer(moe).apply(variables, inputs).stats)
    experts = variables["params"]["experts"]
    moved = {**experts, "down_bias": experts["down_bias"] + 1.0}
    before = run(variables)
    after = run({**variables, "params": {**variables["params"], "experts": moved}})
    load = np.broadcast_to(np.asarray(before["load"])[:, None], (8, 16))
    assert load.sum() == 13 * 2 * 16
    np.testing.assert_allclose(after["output_sum"] - before["output_sum"], load, rtol=1e-4)
