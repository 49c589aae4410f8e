"""``moejax launch``: two processes of two devices train as one process of four does; a job whose
process dies, stands still or is asked to stop ends in order."""

import json
import signal
import time

import jax
import numpy as np
import psutil
import pytest
from launches import children, launch, losses, started, summary, wait_for_steps
from runs import train, write_config

from moejax import cli
from moejax.cost.bill import read
from moejax.training import restore
from moejax.training.metrics import read_metrics

# One MoE layer, which compiles soon, on four devices.
MESH = ("mesh.data=2", "mesh.expert=2", "model.num_layers=1", "model.first_k_dense=0")
DOWN_SECONDS = 60.0


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


def words(config, workdir, *settings: str) -> list[str]:
    """The command line of ``moejax train``."""
    flags = [f"--config.{setting}" for setting in (*MESH, *settings)]
    return [f"--config={config}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def launched(config, tmp_path_factory):
    """A run of two processes, and what the launch printed."""
    workdir = tmp_path_factory.mktemp("launched") / "run"
    done = launch(*words(config, workdir), "--format=json")
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_the_curve_is_that_of_one_process(launched, config, tmp_path):
    workdir, _ = launched
    assert train(config, tmp_path / "run", *MESH) == 0
    ours, theirs = losses(workdir), losses(tmp_path / "run")
    assert len(ours) == len(theirs) == 6
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    one, two = summary(tmp_path / "run"), summary(workdir)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["tokens"] == one["tokens"]
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
    # The newest checkpoint of two processes, restored by this one.
    for a, b in zip(_leaves(workdir), _leaves(tmp_path / "run"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def _leaves(workdir):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restore.load(workdir)[1])]


def test_process_0_alone_speaks_and_writes(launched):
    workdir, done = launched
    assert json.loads(done.stdout)["status"] == "completed"  # one object, and nothing else
    lines = done.stderr.splitlines()
    assert any(line.startswith("[0] step 6/6") for line in lines)
    assert [line for line in lines if line.startswith("[1]")] == []
    steps = [row["step"] for row in read_metrics(workdir) if "loss" in row]
    assert steps == list(range(1, 7))
    bill = read(workdir)
    assert bill["status"] == "completed" and len(bill["segments"]) == 1


def test_a_config_mistake_is_said_once(config, tmp_path):
    done = launch(*words(config, tmp_path / "run", "mesh.data=1"))
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "mesh" in line]
    assert len(said) == 1 and said[0].startswith("[0] moejax train: mesh = ")
    assert "has 2 of the 4 devices of 2 processes" in said[0]
    assert not (tmp_path / "run").exists()


WRONG = {
    "nothing to start": ([], "give what to start after --"),
    "another command": (["plan"], "give what to start after --"),
    "the launcher's flag": (["train", "--processes=3"], "--processes is what moejax launch gives"),
    "no workdir": (["train", "--config=x.py"], "--workdir"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_are_one_line_and_start_nothing(name, capsys):
    rest, said = WRONG[name]
    try:
        status = cli.main(["launch", "--processes=2", "--", *rest])
    except SystemExit as left:
        status = left.code
    assert status == 2
    captured = capsys.readouterr().err
    assert said in captured and captured.count("\n") == 1


def test_a_stall_time_has_to_be_above_zero(capsys):
    flags = ["--processes=2", "--timeout-after-stall=0"]
    assert cli.main(["launch", *flags, "--", "train", "--config=x", "--workdir=y"]) == 2
    assert "--timeout-after-stall = 0.0" in capsys.readouterr().err


def test_partial_flags_of_a_process_are_one_line(config, tmp_path, capsys):
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--processes=2"]
    assert cli.main(["train", *flags]) == 2
    said = capsys.readouterr().err
    assert "--coordinator and --process-id missing" in said and said.count("\n") == 1


FAULTS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_peer_that_dies_or_stands_still_takes_the_job_down(fault, number, config, tmp_path):
    workdir = tmp_path / "run"
    with started(*words(config, workdir, "train.steps=1000000")) as process:
        wait_for_steps(process, workdir, 3)
        job = children(process)
        pid = job[number].pid
        job[number].send_signal(FAULTS[fault])
        began = time.monotonic()
        _, said = process.communicate(timeout=DOWN_SECONDS)
        assert time.monotonic() - began < DOWN_SECONDS
    assert process.returncode == 1
    last = said.splitlines()[-1]
    assert last.startswith(f"moejax launch: process {number} on ") and f"(pid {pid})" in last
    assert ("killed by SIGKILL" if fault == "killed" else "was stopped") in last
    assert not any(map(psutil.pid_exists, [child.pid for child in job]))
    (segment,) = read(workdir)["segments"]
    assert segment["status"] == "failed" and f"(pid {pid})" in segment["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "process 1"])
def test_sigterm_saves_and_the_same_command_goes_on(whom, config, tmp_path):
    workdir = tmp_path / "run"
    line = words(config, workdir, "train.steps=200", "checkpoint.every_steps=0")
    with started(*line) as process:
        wait_for_steps(process, workdir, 5)
        target = process if whom == "launcher" else children(process)[1]
        target.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=DOWN_SECONDS)
    assert process.returncode == 1
    at = "SIGTERM at another process" if whom == "process 1" else "SIGTERM"
    assert f"[0] {at}: stopping after step" in said
    stopped = summary(workdir)
    assert stopped["status"] == "interrupted" and 5 <= stopped["step"] < 200
    done = launch(*line)
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {stopped['step']} of 200" in done.stderr
    assert [row["step"] for row in read_metrics(workdir) if "loss" in row] == list(range(1, 201))
    assert read(workdir)["status"] == "completed"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(config, tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert train(config, whole, *MESH) == 0
    assert train(config, moved, *MESH, "budget.max_flops=2e7") == 0  # one process begins
    step = summary(moved)["step"]
    assert 0 < step < 6
    done = launch(*words(config, moved, "budget.max_flops=1e12"))  # two go on
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {step} of 6" in done.stderr
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-5)
