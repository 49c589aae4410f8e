"""Multi-token prediction in training: its weight, micro-batches, meshes, what is logged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import train, write_config
from test_step import CONFIGS, MESHES, gradients, run, state_on, take_step

from moejax import cli
from moejax.config import ConfigError
from moejax.models import Transformer
from moejax.training.metrics import read_metrics
from moejax.training.run_config import TrainConfig
from moejax.training.step import make_eval_step

MTP = CONFIGS["mtp"]


def at_step(state, number):
    return state.replace(step=jax.device_put(np.int32(number), state.step.sharding))


def test_the_weight_by_step():
    config = TrainConfig(steps=148)
    assert [round(float(config.mtp_schedule(step)), 6) for step in (0, 99, 100, 147)] == [
        0.3, 0.3, 0.1, 0.1,
    ]  # fmt: skip
    never = TrainConfig(steps=10, mtp_switch=1.0)
    assert float(never.mtp_schedule(9)) == pytest.approx(0.3)
    for options in ({"mtp_weight": -1.0}, {"mtp_weight_final": -0.1}, {"mtp_switch": 1.5}):
        with pytest.raises(ConfigError) as error:
            TrainConfig(steps=1, **options)
        assert error.value.field == f"train.{next(iter(options))}"


def test_what_is_measured_is_the_losss_own():
    batch, variables = tiny.batch(), tiny.variables(MTP)
    metrics = run(model="mtp")[1]
    apply = jax.jit(lambda v, *rows: Transformer(MTP).apply(
        v, *rows, train=True, mtp=True, method=Transformer.loss
    ))  # fmt: skip
    part = jax.tree.map(lambda leaf: leaf[0], batch)
    out = apply(variables, part.tokens, part.targets, part.segment_ids, part.positions)
    # The reported loss is the main model's alone, of 52 targets; each of 16 documents has one less.
    np.testing.assert_allclose(metrics.loss, out.nll / 52, rtol=1e-5)
    counted = 52 - 16
    assert float(out.mtp.targets[0]) == counted
    np.testing.assert_allclose(metrics.mtp.loss, out.mtp.nll / counted, rtol=1e-5)
    np.testing.assert_allclose(metrics.mtp.acceptance, out.mtp.accepted / counted, rtol=1e-6)
    assert float(metrics.mtp.weight) == 0.5 and metrics.mtp.loss.shape == (1,)
    assert run(model="blocks")[1].mtp is None


def test_only_the_weight_of_the_modules_loss_changes_at_the_switch():
    early = run(model="mtp")[0]
    one = state_on("one device", "mtp")
    late, metrics = take_step(tiny.batch(), model="mtp", state=at_step(one, 5))
    assert float(metrics.mtp.weight) == 0.125
    before, after = gradients(early), gradients(late)
    # The final norm's gradient, which no balance loss reaches, is a quarter; the head's is not.
    quarter = before["mtp_0"]["final_norm"]["scale"] / 4
    assert tiny.relative_error(after["mtp_0"]["final_norm"]["scale"], quarter) < 1e-5
    assert tiny.relative_error(after["head"], before["head"]) > 0.01


def test_micro_batches_equal_one_batch():
    (one, whole), (two, halves) = run(model="mtp"), run(model="mtp", parts=2)
    tiny.assert_trees_close(gradients(two), gradients(one), 1e-5)
    tiny.assert_trees_close(halves.mtp, whole.mtp, 1e-5)
    np.testing.assert_allclose(halves.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(halves.aux_loss, whole.aux_loss, rtol=1e-5)
    tiny.assert_trees_close(two.router_state, one.router_state, 0.0)
    assert set(one.router_state) == {"segment_0", "mtp_0_layer"}
    moved = one.router_state["mtp_0_layer"]["layer_0"]["moe"]["router"]["bias"]
    old = state_on("one device", "mtp").router_state["mtp_0_layer"]
    assert np.any(np.asarray(moved) != np.asarray(old["layer_0"]["moe"]["router"]["bias"]))
    # Assignments are the experts' of all layers: 2 a token, of 52 tokens and of the counted ones.
    stats = whole.router_stats["mtp_0_layer"]["layer_0"]
    assert float(whole.assignments) == 2 * (52 + float(stats["tokens"].sum()))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data 2 x expert 2 x tensor 2", "fsdp 2 x expert 4"])
def test_a_mesh_gives_what_one_device_gives(mesh):
    (one, alone), (many, spread) = run(model="mtp"), run(mesh, "mtp")
    for name in ("loss", "aux_loss", "gradient_norm"):
        wanted = float(getattr(alone, name))
        assert float(getattr(spread, name)) == pytest.approx(wanted, rel=1e-5), name
    tiny.assert_trees_close(jax.device_get(spread.mtp), jax.device_get(alone.mtp), 1e-5)
    tiny.assert_trees_close(gradients(many), gradients(one), 1e-5)
    kernel = many.params["mtp_0"]["projection"]["kernel"]
    cut = {shard.data.shape for shard in kernel.addressable_shards}
    assert cut == {(32 // MESHES[mesh].fsdp, 16)}


def test_training_lowers_the_modules_loss_and_raises_acceptance():
    state, seen = state_on("one device", "mtp"), []
    for _ in range(60):
        state, metrics = take_step(tiny.batch(), model="mtp", state=state)
        seen.append(jax.device_get((metrics.loss, *metrics.mtp.loss, *metrics.mtp.acceptance)))
    (first, ahead, accepted), (last, ahead_last, accepted_last) = seen[0], seen[-1]
    assert last < 0.5 * first and ahead_last < 0.7 * ahead, (seen[0], seen[-1])
    assert accepted < 0.2 and accepted_last > accepted + 0.2, (seen[0], seen[-1])
    assert int(state.step) == 60


def test_evaluation_runs_no_module():
    none = dataclasses.replace(MTP, mtp_depth=0)
    shapes = jax.eval_shape(lambda: state_on("one device", "mtp"))
    part = lambda tree: {k: v for k, v in tree.items() if "mtp" not in k}
    main = shapes.replace(params=part(shapes.params), router_state=part(shapes.router_state))
    program = lambda config, state: jax.make_jaxpr(make_eval_step(config))(state, tiny.batch())
    names = lambda jaxpr: [equation.primitive.name for equation in jaxpr.eqns]
    assert names(program(MTP, shapes)) == names(program(none, main))


def test_padding_alone_changes_no_parameter():
    batch = tiny.batch()
    empty = batch.replace(segment_ids=jnp.zeros_like(batch.segment_ids))
    state, metrics = take_step(empty, model="mtp")
    old = state_on("one device", "mtp")
    jax.tree.map(np.testing.assert_array_equal, state.params, old.params)
    assert float(metrics.mtp.loss[0]) == float(metrics.mtp.acceptance[0]) == 0.0


@pytest.mark.slow
def test_a_run_logs_its_modules_and_is_inspected(tmp_path, capsys):
    config, workdir = write_config(tmp_path), tmp_path / "run"
    assert train(config, workdir, "model.mtp_depth=2", "train.mtp_switch=0.5") == 0
    rows = [row for row in read_metrics(workdir) if "mtp/weight" in row]
    assert [row["mtp/weight"] for row in rows] == pytest.approx([0.3] * 3 + [0.1] * 3)
    names = {f"mtp/{name}_{k}" for name in ("loss", "acceptance") for k in (0, 1)}
    assert all(names <= row.keys() for row in rows)
    assert rows[-1]["mtp/loss_0"] < rows[0]["mtp/loss_0"]
    # One MoE layer of the model and the two modules'.
    assert len(rows[0]["router/load_by_layer"]) == 3
    capsys.readouterr()
    assert cli.main(["inspect", f"--workdir={workdir}", "--format=json", "--batches=2"]) == 0
    found = capsys.readouterr().out
    assert '"layers": [1, 2, 3]' in " ".join(found.split())
    assert cli.main(["generate", f"--workdir={workdir}", "--prompt=the", "--tokens=4"]) == 0
