"""``moejax plan --lower``: a config's step compiled for devices that are not there."""

import json
import math
import pathlib

import pytest
import runs

from moejax import cli
from moejax.training import lowering

ROOT = pathlib.Path(__file__).parents[2]


def lower(capsys, path, *flags):
    status = cli.main(["plan", f"--config={path}", "--lower", "--format=json", *flags])
    out = capsys.readouterr()
    assert status == 0, out.err
    return json.loads(out.out)["lowered"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return runs.write_config(tmp_path_factory.mktemp("lowering"))


def test_a_tiny_step_for_sixteen_devices(config, capsys):
    # Twice as many as this process has: the child's jax is its own.
    found = lower(
        capsys, config, "--devices=16", "--config.mesh={'fsdp': 4, 'expert': 2, 'data': 2}",
        "--config.train.batch_size=16", "--config.cost.hardware=h100_sxm",
    )  # fmt: skip
    assert found["devices"] == 16 and math.prod(found["mesh"].values()) == 16
    assert found["mesh"]["fsdp"] == 4 and found["mesh"]["context"] == 1
    # 12 bytes a parameter, cut by four and the experts by eight; norms are whole.
    assert found["sharded_bytes_per_device"] == pytest.approx(
        found["state_bytes_per_device"], abs=64
    )
    assert found["counted_bytes_per_device"] == pytest.approx(
        found["state_bytes_per_device"], rel=0.15
    )
    assert found["temp_bytes_per_device"] > 0 and found["peak_process_bytes"] > 1e6
    assert 0 < found["seconds"]["lower"] < found["seconds"]["total"]
    kinds = {(row["kind"], tuple(row["axes"])) for row in found["collectives"]}
    assert ("all-gather", ("fsdp",)) in kinds and ("all-to-all", ("expert",)) in kinds
    assert all(row["count"] > 0 and row["bytes"] > 0 for row in found["collectives"])


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--devices=4", "--config.mesh={'fsdp': 8}"], "needs 8 devices, but there are 4"),
        (["--devices=0"], "--devices = 0: must be a finite number above zero"),
        (["--devices=-3"], "--devices = -3: must be a finite number above zero"),
        (["--devices=8", "--config.mesh={'context': 3}"], "mesh.context = 3: does not divide"),
        (["--compare=h100_sxm,b200"], "leave out one of the two"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_compiled(
    config, capsys, flags, wanted, monkeypatch
):
    monkeypatch.setattr(lowering.subprocess, "run", None)
    settings = ["--config.cost.hardware=h100_sxm", *flags]
    assert cli.main(["plan", f"--config={config}", "--lower", *settings]) == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1


def test_only_a_config_says_how_it_is_trained(capsys):
    assert cli.main(["plan", "--lower", "--model=olmoe_1b_7b", "--tokens=1e9"]) == 2
    error = capsys.readouterr().err
    assert "give --config=FILE" in error and error.count("\n") == 1
    assert cli.main(["plan", "--lower"]) == 2
    error = capsys.readouterr().err
    assert "give either --config=FILE" in error and error.count("\n") == 1


def test_a_child_that_fails_is_named(config, monkeypatch, capsys):
    class Done:
        returncode, stderr, stdout = 134, "many lines\nout of memory\n", ""

    monkeypatch.setattr(lowering.subprocess, "run", lambda *_, **__: Done)
    assert cli.main(["plan", f"--config={config}", "--lower", "--devices=8"]) == 1
    assert capsys.readouterr().err.endswith("for 8 devices failed: out of memory\n")


def test_forced_devices_replace_those_that_were(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_other=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    lowering.force_devices(64)
    assert lowering.os.environ["JAX_PLATFORMS"] == "cpu"
    flags = lowering.os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_other=1", "--xla_force_host_platform_device_count=64"]


@pytest.mark.slow
def test_v3_compiles_for_64_devices_from_shapes(capsys):
    """671.03B parameters and 11.61B of an MTP module, 12 bytes each: FP32 weights and moments."""
    found = lower(
        capsys, ROOT / "experiments/models/deepseek_v3.py", "--devices=64",
        "--config.mesh={'fsdp': 8, 'expert': 8}", "--config.train.batch_size=64",
        "--config.train.micro_batches=1",
    )  # fmt: skip
    assert found["devices"] == 64
    assert found["params"] == pytest.approx(671.03e9 + 11.61e9, rel=1e-4)
    # By hand, 8 x 8 devices: 59 layers of 256 experts of 3 · 7168 · 2048 parameters are cut into
    # 64 parts, the rest into 8.
    routed = 59 * 256 * 3 * 7168 * 2048
    by_hand = 12 * (routed / 64 + (found["params"] - routed) / 8)
    assert found["counted_bytes_per_device"] == pytest.approx(by_hand, rel=1e-3)  # whole norms
    # What the compiled program takes on each device, and what its shardings say.
    assert found["state_bytes_per_device"] == pytest.approx(by_hand, rel=0.01)
    assert found["sharded_bytes_per_device"] == pytest.approx(by_hand, rel=0.01)
    # The state is donated: the step gives it back in place.
    assert found["output_bytes_per_device"] == pytest.approx(
        found["state_bytes_per_device"], rel=0.01
    )
    assert found["temp_bytes_per_device"] > 0
    assert found["seconds"]["total"] < 180
    assert found["peak_process_bytes"] < 6e9  # the weights alone would be 2.7e12
    assert {"all-gather", "all-to-all"} <= {row["kind"] for row in found["collectives"]}


@pytest.mark.slow
def test_a_plan_expects_about_the_memory_that_the_program_takes(capsys):
    """Llama-3.1-8B on 16 devices: the state within 0.1 %, the temporaries of XLA's CPU backend
    within what fusion and buffers that cannot be shared make of them."""
    found = lower(
        capsys, ROOT / "experiments/models/llama3_1_8b.py", "--devices=16",
        "--config.mesh={'fsdp': 16}", "--config.train.batch_size=16",
        "--config.train.micro_batches=1", "--config.model.dtype=float32",
    )  # fmt: skip
    assert found["counted_bytes_per_device"] == pytest.approx(
        found["state_bytes_per_device"], rel=0.001
    )
    planned, taken = found["planned_temp_bytes_per_device"], found["temp_bytes_per_device"]
    assert 0.7 < planned / taken < 1.1


@pytest.mark.slow
def test_a_cut_length_divides_the_memory_of_its_activations(capsys):
    """Llama-3.1-8B with rows of 8,192 positions, whole and in four parts."""
    flags = (
        "--config.train.batch_size=8", "--config.train.micro_batches=1",
        "--config.train.seq_len=8192", "--config.model.remat=full",
        "--config.model.loss_chunk=512", "--devices=8",
    )  # fmt: skip
    path = ROOT / "experiments/models/llama3_1_8b.py"
    whole = lower(capsys, path, "--config.mesh={'fsdp': 2}", *flags)
    cut = lower(capsys, path, "--config.mesh={'fsdp': 2, 'context': 4}", *flags)
    assert cut["state_bytes_per_device"] == whole["state_bytes_per_device"]
    assert cut["temp_bytes_per_device"] < 0.6 * whole["temp_bytes_per_device"]
    planned = cut["planned_temp_bytes_per_device"] / whole["planned_temp_bytes_per_device"]
    assert planned < 0.7  # 16 GB of it are gradients, which no cut of the length divides
