"""Whole runs: what they leave behind, resuming, budgets, signals and failures."""

import fcntl
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from runs import train, write_config

from moejax.cost import ledger
from moejax.cost.bill import read
from moejax.cost.hardware import cpu_cores
from moejax.cost.ledger import PHASES
from moejax.training import loop, restore
from moejax.training.metrics import read_metrics

SUMMARY = [
    "status",
    "step",
    "tokens",
    "loss",
    "val_loss",
    "val_bits_per_byte",
    "baselines",
    "tokens_per_second",
    "compile_seconds",
    "mfu",
    "peak_flops",
    "dispatch",
    "dispatch_reason",
    "exchange",
    "exchange_reason",
    "dollars",
    "fingerprint",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(config, workdir) == 0
    return workdir


def summary(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def parameters(workdir: pathlib.Path) -> list[np.ndarray]:
    """Parameters and router state of a run's newest checkpoint."""
    _, variables = restore.load(workdir)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]


def losses(workdir: pathlib.Path) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def test_a_run_leaves_what_the_contract_names(whole):
    names = "config.json summary.json metrics.jsonl ledger.jsonl checkpoints tensorboard loss.svg"
    assert {name for name in names.split() if (whole / name).exists()} == set(names.split())
    result = summary(whole)
    assert [name for name in SUMMARY if name not in result] == []
    assert result["status"] == "completed" and result["step"] == 6
    assert result["baselines"].keys() == {"unigram", "gzip"}
    assert result["dispatch"] == "blocks" and "auto" in result["dispatch_reason"]
    assert result["exchange"] == "none" and "mesh.expert is 1" in result["exchange_reason"]
    assert math.isfinite(result["val_bits_per_byte"])
    record = json.loads((whole / "config.json").read_text())
    assert record["config"]["moe"]["num_experts"] == 4
    assert record["config"]["router"]["bias_step"] == 0.01
    assert record["packages"]["jax"] == jax.__version__
    assert len(record["fingerprint"]) == 64


def test_metrics_hold_the_routers_health(whole):
    row = read_metrics(whole)[0]
    for name in ("max_violation", "load_entropy", "dropped_share", "load_by_layer"):
        assert f"router/{name}" in row
    load = np.asarray(row["router/load_by_layer"])
    assert load.shape == (1, 4)  # one MoE layer, four experts
    np.testing.assert_allclose(load.sum(axis=1), 1, atol=1e-3)
    assert row["router/dropped_share"] == 0
    assert row["peak_flops"] > 0 and row["dollars"] > 0
    assert np.shape(row["router/bias_by_layer"]) == (1, 4)
    held_out = [row for row in read_metrics(whole) if "val_loss" in row][-1]
    worst = held_out["val/router/max_violation_batch_by_layer"]
    # The whole of the held-out text is no less even than its batches are.
    assert 0 <= held_out["val/router/max_violation_global_by_layer"][0] <= worst[0] + 1e-4
    np.testing.assert_allclose(np.sum(held_out["val/router/load_by_layer"]), 1, atol=1e-3)


def test_the_ledger_is_closed_and_charges_its_phases(whole):
    bill = read(whole)
    assert bill["status"] == "completed" and bill["seconds"].keys() == set(PHASES)
    assert bill["seconds"]["compile"] > 0 and bill["seconds"]["train"] > 0
    assert bill["tokens"] == bill["tokens_seen"] == summary(whole)["tokens"]


def test_the_ledger_holds_the_plan_that_the_run_printed(whole):
    against = read(whole)["plan"]
    planned, actual, difference = (against[k] for k in ("planned", "actual", "difference"))
    assert planned["tokens"] == pytest.approx(actual["tokens"], rel=0.01)
    assert planned["model_flops"] == pytest.approx(actual["model_flops"], rel=0.01)
    assert against["parts"]["compile"]["device_hours"] > 0
    for unit, value in difference.items():
        found = sum(part[unit] for part in against["parts"].values())
        assert found == pytest.approx(value, rel=1e-6, abs=1e-9 * actual[unit])


def test_the_same_command_gives_the_same_bits(config, whole, tmp_path):
    assert train(config, tmp_path / "again") == 0
    assert losses(tmp_path / "again") == losses(whole)
    for again, first in zip(parameters(tmp_path / "again"), parameters(whole), strict=True):
        np.testing.assert_array_equal(again, first)


def test_a_folder_that_another_process_trains_in_is_refused(config, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(config, workdir, "budget.max_hours=1e-6") == 0
    capsys.readouterr()
    with open(workdir / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train(config, workdir) == 2
    assert "another process trains in it" in capsys.readouterr().err


def test_a_last_checkpoint_that_cannot_be_saved_fails_the_run(
    config, tmp_path, capsys, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moejax.training.manifest.seal", full)
    assert train(config, tmp_path / "run") == 1
    assert "the last checkpoint was not saved" in capsys.readouterr().err
    assert summary(tmp_path / "run")["status"] == read(tmp_path / "run")["status"] == "failed"


def test_a_warning_above_four_epochs(config, tmp_path, capsys):
    assert train(config, tmp_path / "run", "train.steps=600", "budget.max_hours=1e-6") == 0
    assert "more than 4 epochs" in capsys.readouterr().err


def test_tokens_charged_are_targets_not_padding(whole):
    targets = summary(whole)["tokens"]
    assert 0 < targets <= 6 * 8 * 32


def test_a_complete_run_is_left_alone(config, whole, capsys):
    before = (whole / "ledger.jsonl").read_text()
    assert train(config, whole) == 0
    assert "complete" in capsys.readouterr().err
    assert (whole / "ledger.jsonl").read_text() == before


def test_stopped_by_a_budget_and_resumed_equals_uninterrupted(config, whole, tmp_path, capsys):
    """Three steps by a FLOP budget (between two periodic checkpoints), then the rest."""
    flops = [row["model_flops"] for row in read_metrics(whole) if "model_flops" in row]
    workdir = tmp_path / "run"
    assert train(config, workdir, f"budget.max_flops={flops[2]}") == 0
    stopped = summary(workdir)
    assert stopped["status"] == "budget" and stopped["step"] in (3, 4)
    assert read(workdir)["status"] == "budget"
    assert train(config, workdir, "budget.max_flops=None") == 0
    assert f"resuming at step {stopped['step']} of 6" in capsys.readouterr().err
    assert summary(workdir)["status"] == "completed"
    for resumed, straight in zip(parameters(workdir), parameters(whole), strict=True):
        np.testing.assert_array_equal(resumed, straight)
    assert losses(workdir) == losses(whole)
    assert summary(workdir)["tokens"] == summary(whole)["tokens"]
    assert summary(workdir)["val_loss"] == summary(whole)["val_loss"]
    bill = read(workdir)
    assert len(bill["segments"]) == 2


def test_a_budget_spent_before_the_first_step_stops_there(config, tmp_path):
    assert train(config, tmp_path / "run", "budget.max_dollars=1e-7") == 0
    result = summary(tmp_path / "run")
    assert result["status"] == "budget" and result["step"] == 0


def test_hours_and_dollars_stop_within_a_step_and_the_run_goes_on(
    config, whole, tmp_path, monkeypatch
):
    """Every batch takes 100 s by the ledger's clock, and 100 s cost a dollar for each core.

    250 s are reached in the third step; 450 s' worth of dollars in the fifth.
    """
    now, place = [1000.0], loop._place

    def slowly(*arguments):
        now[0] += 100.0
        return place(*arguments)

    clock = {name: getattr(time, name) for name in ("strftime", "gmtime")}
    monkeypatch.setattr(ledger, "time", types.SimpleNamespace(monotonic=lambda: now[0], **clock))
    monkeypatch.setattr("moejax.training.train.process_age", lambda: 0.0)  # pytest's own
    monkeypatch.setattr(loop, "_place", slowly)
    workdir, cores, price = tmp_path / "run", cpu_cores(), "cost.price=36.0"
    assert train(config, workdir, price, f"budget.max_hours={250 / 3600}") == 0
    bill = read(workdir)
    assert (summary(workdir)["step"], bill["status"]) == (3, "budget")
    starting = bill["seconds"]["startup"]  # in real seconds
    assert bill["wall_seconds"] == pytest.approx(300 + starting, rel=1e-6)
    limit = cores * (4.5 + starting / 100)
    assert train(config, workdir, price, f"budget.max_dollars={limit}") == 0
    bill = read(workdir)
    assert (summary(workdir)["step"], bill["status"]) == (5, "budget")
    assert 0 <= bill["dollars"] - limit < cores  # a step costs a dollar a core
    assert train(config, workdir, price, f"budget.max_dollars={100 * limit}") == 0
    bill = read(workdir)
    assert [part["status"] for part in bill["segments"]] == ["budget", "budget", "completed"]
    assert losses(workdir) == losses(whole)
    # The sum over segments is what they took: six steps, a validation of one batch or more.
    assert bill["seconds"]["train"] == pytest.approx(600)
    assert sum(bill["seconds"].values()) == pytest.approx(
        now[0] - 1000.0 + bill["seconds"]["startup"], rel=0.01
    )
    assert bill["dollars"] == pytest.approx(cores * bill["wall_seconds"] / 100)
    assert bill["redone"]["steps"] == 0 and bill["tokens_seen"] == bill["tokens"]


def test_another_config_is_refused_and_its_fields_named(config, whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert train(config, whole, "optim.learning_rate=0.5", "moe.d_expert=16") == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "optim.learning_rate (0.01 -> 0.5)" in line and "moe.d_expert (8 -> 16)" in line
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_another_corpus_is_refused(tmp_path, capsys):
    config = write_config(tmp_path)
    assert train(config, tmp_path / "run", "budget.max_hours=1e-6") == 0
    (tmp_path / "corpus" / "new.txt").write_text("a text that was not there before\n" * 20)
    capsys.readouterr()
    assert train(config, tmp_path / "run") == 2
    line = capsys.readouterr().err.strip()
    assert "corpus is not the one" in line and "\n" not in line


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, capsys):
    settings = ("optim.learning_rate=1e30", "optim.clip_norm=0.0", "optim.warmup_steps=0")
    assert train(config, tmp_path / "run", *settings) == 1
    record = json.loads((tmp_path / "run" / "divergence.json").read_text())
    assert f"step {record['step']}: loss" in capsys.readouterr().err
    assert len(record["batch_fingerprint"]) == 64
    assert read(tmp_path / "run")["status"] == "failed"
    with np.load(tmp_path / "run" / "divergence_batch.npz") as batch:
        assert batch["tokens"].shape == (8, 32)


def test_a_resumed_run_whose_newest_checkpoint_is_damaged_goes_back_one(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(config, workdir, "budget.max_flops=1e7") == 0
    first = summary(workdir)["step"]
    assert train(config, workdir, "budget.max_flops=4e7") == 0
    second = summary(workdir)["step"]
    assert 0 < first < second < 6
    data = max((workdir / "checkpoints" / str(second)).rglob("*"), key=lambda p: p.stat().st_size)
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    capsys.readouterr()
    assert train(config, workdir, "budget.max_flops=None") == 0
    said = capsys.readouterr().err
    assert str(data.name) in said and "going back to the checkpoint" in said
    bill, again = read(workdir), int(re.search(r"resuming at step (\d+)", said)[1])
    assert bill["redone"]["steps"] == second - again > 0
    assert bill["tokens_seen"] == summary(workdir)["tokens"]
    assert bill["tokens"] == bill["tokens_seen"] + bill["redone"]["tokens"]


def test_micro_batches_and_a_mesh_give_the_same_run(config, whole, tmp_path, capsys):
    """Two micro-batches on expert 2 x context 2 x tensor 2: the same losses within rounding.

    And a sample in the end, which is decoded with a cache that is not cut.
    """
    mesh = ("mesh.expert=2", "mesh.context=2", "mesh.tensor=2", "train.sample_tokens=2")
    assert train(config, tmp_path / "run", "train.micro_batches=2", *mesh) == 0
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole), rtol=1e-4)
    said = capsys.readouterr().err
    assert "dispatch    blocks (chosen by auto" in said
    assert "exchange    all_to_all (chosen by auto" in said
    assert summary(tmp_path / "run")["exchange"] == "all_to_all"
    assert "all-to-all over expert: " in said and said.count("sends       ") == 1
    assert "warning: " not in said
    # Two of four experts on each of two devices: 1 + 2/3 devices a token where choices are random,
    # and 1 of them another one for 5/6 of the tokens. Vectors of 16 numbers, there and back.
    row = read_metrics(tmp_path / "run")[0]
    assert 1 < row["router/devices_per_token"] < 2 and row["router/nodes_per_token"] == 1
    assert 0 < row["router/bytes_sent_per_token"] < 2 * 16 * 4
    assert row["router/exchange_dropped_share"] == 0
    # The bill's: of one MoE layer, forward and backward, from both devices of the tensor axis.
    sent, by_step = read(tmp_path / "run")["exchange"], read_metrics(tmp_path / "run")
    each = [r["router/bytes_sent_per_token"] for r in by_step if "router/devices_per_token" in r]
    assert min(each) <= sent["bytes_per_token"]["scale_up"] / (2 * 2) <= max(each)
    assert sent["bytes_per_token"]["scale_out"] == 0 and sent["kind"] == "all_to_all"
    assert read(whole)["exchange"] is None
    alone = read_metrics(whole)[0]
    assert alone["router/devices_per_token"] == 1 and alone["router/bytes_sent_per_token"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["moe.dispatch=grouped"], "moe.dispatch = 'grouped': its kernels need a GPU"),
        (["moe.exchange=ragged_all_to_all"], "moe.exchange = 'ragged_all_to_all': XLA does not"),
        (["mesh.expert=3", "train.batch_size=9"], "mesh.expert = 3: does not divide moe.num_exp"),
        (["moe.drop_policy=choice"], "moe.drop_policy = 'choice': lets a later token"),
    ],
)
def test_what_cannot_run_here_exits_with_2_and_writes_nothing(
    config, tmp_path, capsys, settings, message
):
    assert train(config, tmp_path / "run", *settings) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_the_step_saves_and_closes_the_ledger(config, tmp_path):
    """From the command line, in a process of its own."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "moejax.cli", "train", f"--config={config}"]
    command += [f"--workdir={workdir}", "--config.train.steps=100000"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    begun = time.time()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (workdir / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 1
    assert "SIGTERM: stopping after step" in said and "Traceback" not in said
    bill = read(workdir)
    assert bill["status"] == "interrupted"
    # From this process's start of the other to the last line of its ledger: all of it is charged,
    # but for the moment that the system takes to make a process.
    wall = (workdir / "ledger.jsonl").stat().st_mtime - begun
    assert sum(bill["seconds"].values()) == pytest.approx(wall, rel=0.01, abs=0.5)
    assert summary(workdir)["status"] == "interrupted"
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert summary(workdir)["step"] == max(steps) > 0


@pytest.mark.slow
def test_two_processes_of_a_run_are_charged_what_they_took(config, tmp_path):
    """From the command line: the phases of both segments against the clock, within 1 %."""
    workdir, wall = tmp_path / "run", 0.0
    environment = {**os.environ, "XLA_FLAGS": ""}
    for limit in ("1e7", "None"):
        command = [sys.executable, "-m", "moejax.cli", "train", f"--config={config}"]
        command += [f"--workdir={workdir}", f"--config.budget.max_flops={limit}"]
        begun = time.time()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        wall += (workdir / "ledger.jsonl").stat().st_mtime - begun
    bill = read(workdir)
    assert [part["status"] for part in bill["segments"]] == ["budget", "completed"]
    assert sum(bill["seconds"].values()) == pytest.approx(wall, rel=0.01, abs=0.2)
    assert bill["wall_seconds"] == pytest.approx(
        sum(part["wall_seconds"] for part in bill["segments"])
    )
