"""Signals at every stage of a run, and disks that are full or read-only: what is said and kept."""

import dataclasses
import json
import logging
import os
import pathlib
import signal
import sys
import threading
import time
import types

import pytest
from runs import assert_same, summary, write_config

from moejax.cost.bill import read
from moejax.cost.ledger import Ledger
from moejax.training import loop, manifest, metrics, prepare, programs, run_config, run_dir
from moejax.training.checkpoints import Checkpointer
from moejax.training.loop import Interrupted, Run, RunFailed
from moejax.training.metrics import read_metrics
from moejax.training.programs import ProgramCache
from moejax.training.quiet_orbax import quieten
from moejax.training.train import train

FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def cache():
    return ProgramCache()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = write_config(tmp_path_factory.mktemp("config"))
    settings = ["train.steps=6", "checkpoint.every_steps=2", "data.prefetch=0"]
    return run_config.load(str(file), settings)


@pytest.fixture(scope="module")
def whole(config, cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(config, str(workdir), programs=cache)
    return workdir


def evaluated(config):
    train_config = dataclasses.replace(config.train, eval_every=3, eval_batches=0)
    return dataclasses.replace(config, train=train_config)


def ask(after=0.0):
    """SIGTERM to this process, now or after some seconds."""
    if not after:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def once(monkeypatch, owner, name, before):
    """Calls ``before`` at the first call of a function, and then the function."""
    real, called = getattr(owner, name), []

    def first(*arguments, **options):
        if not called:
            called.append(True)
            before()
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, first)


# Signals


def test_while_the_data_is_prepared(config, cache, tmp_path, monkeypatch):
    once(monkeypatch, prepare, "open_dataset", ask)
    with pytest.raises(Interrupted, match="SIGTERM: before it began; nothing was written"):
        train(config, str(tmp_path / "run"), programs=cache)
    assert not (tmp_path / "run").exists()


def test_while_it_compiles_it_ends_at_once_with_its_ledger_closed(
    config, whole, tmp_path, monkeypatch
):
    """Nothing can stop a compiler, so nobody waits for it."""
    done, first = threading.Event(), threading.Lock()

    class Slow:
        def compile(self):
            if first.acquire(blocking=False):
                ask(after=0.2)
            done.wait(60)

    slow = lambda setup: programs.Lowered(Slow(), Slow(), Slow(), None)
    with monkeypatch.context() as patch:
        patch.setattr(programs, "lower", slow)
        begun = time.monotonic()
        try:
            with pytest.raises(Interrupted, match="SIGTERM: before its first step"):
                train(config, str(tmp_path / "run"))
            assert time.monotonic() - begun < 10 and programs.compiling()
        finally:
            done.set()
    bill = read(tmp_path / "run")
    assert bill["status"] == "interrupted" and bill["seconds"]["compile"] > 0
    assert summary(tmp_path / "run")["status"] == "interrupted"


def test_while_it_restores(config, cache, whole, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    stopped_by_budget(config, workdir, cache, whole)
    with monkeypatch.context() as patch:
        once(patch, Checkpointer, "load", lambda: (ask(after=0.2), time.sleep(30)))
        with pytest.raises(Interrupted, match="before its first step; nothing is lost"):
            train(config, str(workdir), programs=cache)
    assert read(workdir)["status"] == "interrupted"
    train(config, str(workdir), programs=cache)
    assert_same(workdir, whole)


def stopped_by_budget(config, workdir, cache, whole):
    flops = [row["model_flops"] for row in read_metrics(whole) if "model_flops" in row]
    budget = dataclasses.replace(config.budget, max_flops=flops[2])
    train(dataclasses.replace(config, budget=budget), str(workdir), programs=cache)


@pytest.mark.parametrize("where", ["a step", "a save"])
def test_while_it_trains_or_saves(config, cache, whole, tmp_path, monkeypatch, where, capsys):
    with monkeypatch.context() as patch:
        owner, name = (loop, "_place") if where == "a step" else (manifest, "seal")
        once(patch, owner, name, ask)
        result = train(config, str(tmp_path / "run"), programs=cache)
    assert result["status"] == "interrupted" and 0 < result["step"] < 6
    assert "SIGTERM: stopping after step" in capsys.readouterr().err
    assert result["step"] in manifest.sealed(tmp_path / "run" / "checkpoints")
    train(config, str(tmp_path / "run"), programs=cache)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [3, 6])
def test_while_it_validates(config, cache, whole, tmp_path, monkeypatch, step, capsys):
    """Held-out text may take longer than the grace period: the validation is left out, the state
    is saved. The last one, after step 6, is made up for by the process that goes on."""
    config = evaluated(config)
    real = Run._validate

    def asked(run, *arguments):
        if run.step == step:
            ask()
        return real(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_validate", asked)
        result = train(config, str(tmp_path / "run"), programs=cache)
    said = capsys.readouterr().err
    assert f"SIGTERM: the validation after step {step} is left out" in said
    assert (result["status"], result["step"]) == ("interrupted", step)
    assert step in manifest.sealed(tmp_path / "run" / "checkpoints")
    result = train(config, str(tmp_path / "run"), programs=cache)
    assert result["status"] == "completed" and result["val_step"] == 6
    assert result["val_loss"] == summary(whole)["val_loss"]
    assert_same(tmp_path / "run", whole)


# Disks


def test_lines_of_metrics_that_have_no_room_are_lost_and_training_goes_on(
    config, cache, whole, tmp_path, monkeypatch, capsys
):
    real = metrics._append

    def append(file, line):
        if json.loads(line)["step"] in (2, 3):
            raise FULL
        real(file, line)

    monkeypatch.setattr(metrics, "_append", append)
    result = train(config, str(tmp_path / "run"), programs=cache)
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert (result["status"], result["failed_metrics"]) == ("completed", 2)
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert steps == [1, 4, 5, 6]
    assert_same(tmp_path / "run", whole)


def test_what_tensorstore_shows_of_a_full_disk_is_dropped_and_nothing_else(monkeypatch, caplog):
    """Its threads report to an event loop that is closed by then; seen on a real full disk."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    quieten()
    quieten()
    say = lambda error, thing: sys.unraisablehook(
        types.SimpleNamespace(exc_value=error, object=thing)
    )
    say(RuntimeError("Event loop is closed"), None)
    say(RuntimeError("Event loop is closed"), "a coroutine of someone else's")
    say(ValueError("Event loop is closed"), None)
    say(RuntimeError("another"), None)
    assert len(seen) == 3
    log = logging.getLogger("asyncio")
    for text in ("never retrieved: coro defined at orbax/serialization.py", "another task"):
        log.error(text)
    assert [record.getMessage() for record in caplog.records] == ["another task"]


@pytest.mark.parametrize("file", ["ledger.jsonl", "summary.json"])
def test_a_record_that_cannot_be_closed_is_one_line_and_the_checkpoints_are_safe(
    config, cache, whole, tmp_path, monkeypatch, file
):
    with monkeypatch.context() as patch:
        if file == "ledger.jsonl":
            write = Ledger._write

            def refuse(ledger, record):
                if record["event"] == "close":
                    raise FULL
                write(ledger, record)

            patch.setattr(Ledger, "_write", refuse)
        else:
            patch.setattr(run_dir.RunDirectory, "write_summary", lambda *_: raise_(FULL))
        with pytest.raises(RunFailed, match=rf"{file} cannot be written: No space left on device; "
                           "the checkpoints are safe"):  # fmt: skip
            train(config, str(tmp_path / "run"), programs=cache)
    assert_same(tmp_path / "run", whole)
    result = train(config, str(tmp_path / "run"), programs=cache)
    assert result["status"] == "completed"
    assert read(tmp_path / "run")["segments"][-1]["status"] == "completed"


def raise_(error):
    raise error


def test_what_went_wrong_is_said_before_what_could_not_be_written(
    config, cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(manifest, "seal", lambda *_: raise_(FULL))
    monkeypatch.setattr(run_dir.RunDirectory, "write_summary", lambda *_: raise_(FULL))
    with pytest.raises(RunFailed, match=r"the last checkpoint was not saved: .*free some"):
        train(config, str(tmp_path / "run"), programs=cache)
    assert "summary.json cannot be written" in capsys.readouterr().err


def test_a_folder_that_was_being_made_is_not_in_the_way(config, cache, whole, tmp_path):
    """A process that is killed before the run's config.json is there leaves these behind."""
    workdir = tmp_path / "run"
    for name in (".lock", "config.json.tmp"):
        workdir.mkdir(exist_ok=True)
        (workdir / name).write_text("")
    (workdir / "tokenizer").mkdir()
    assert run_dir.check_workdir(str(workdir)) == pathlib.Path(workdir)
    train(config, str(workdir), programs=cache)
    assert_same(workdir, whole)


def test_two_runs_on_the_same_mesh_have_the_same_bits(config, cache, tmp_path):
    """Same seed, mesh and versions: parameters and losses, with the programs compiled twice."""
    mesh = dataclasses.replace(config.mesh, data=2, fsdp=2, expert=2)
    config = dataclasses.replace(config, mesh=mesh)
    for name in ("a", "b"):
        train(config, str(tmp_path / name), programs=ProgramCache())
    assert_same(tmp_path / "a", tmp_path / "b")
    rows = [read_metrics(tmp_path / name) for name in ("a", "b")]
    assert [r.get("loss") for r in rows[0]] == [r.get("loss") for r in rows[1]]
    prints = {summary(tmp_path / name)["fingerprint"] for name in ("a", "b")}
    assert len(prints) == 1
