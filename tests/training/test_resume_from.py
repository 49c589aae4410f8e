"""Going on from a step of one's choice, and from local copies; and what is given up then."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from runs import assert_same, summary, write_config
from runs import train as command

from moejax.config import ConfigError
from moejax.cost.bill import read
from moejax.training import local_copies, run_config
from moejax.training.checkpoints import Checkpointer
from moejax.training.loop import Run
from moejax.training.metrics import read_metrics
from moejax.training.programs import ProgramCache
from moejax.training.run_dir import read_record
from moejax.training.train import train


@pytest.fixture(scope="module")
def cache():
    return ProgramCache()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def config(file):
    settings = ["train.steps=8", "checkpoint.every_steps=2", "checkpoint.keep_newest=4",
                "data.prefetch=0"]  # fmt: skip
    return run_config.load(str(file), settings)


@pytest.fixture(scope="module")
def whole(config, cache, tmp_path_factory):
    """Eight steps, and checkpoints of steps 2, 4, 6 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(config, str(workdir), programs=cache)
    return workdir


@pytest.fixture()
def run(whole, tmp_path):
    """A copy of it."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


def with_checkpoint(config, **changes):
    checkpoint = dataclasses.replace(config.checkpoint, **changes)
    return dataclasses.replace(config, checkpoint=checkpoint)


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def stop_after(monkeypatch, step):
    """Ends the process's run, as a kill would, after a step and whatever is saved there."""
    real = Run._validate_and_save

    def killed(run):
        real(run)
        if run.step == step:
            for place in run.places:
                place.finalize()
            raise RuntimeError("killed")

    monkeypatch.setattr(Run, "_validate_and_save", killed)


# --resume-from


def test_a_complete_run_goes_on_from_the_step_and_the_ledger_keeps_everything(
    config, cache, run, whole, capsys
):
    before = read(run)
    result = train(config, str(run), programs=cache, resume_from=4)
    said = capsys.readouterr().err
    assert "going back to step 4: given up: checkpoints of steps 6, 8" in said
    assert "resuming at step 4 of 8" in said
    assert result["status"] == summary(run)["status"] == "completed"
    assert losses(run) == losses(whole)
    assert_same(run, whole)
    bill = read(run)
    assert [part["status"] for part in bill["segments"]] == ["completed", "completed"]
    assert bill["redone"]["steps"] == 4 and bill["tokens_seen"] == before["tokens_seen"]
    assert bill["dollars"] > before["dollars"] and bill["segments"][0] == before["segments"][0]
    assert read_record(run)["given_up"] == [{"to": 4, "steps": [6, 8]}]


def test_no_such_step_is_one_line_and_changes_nothing(file, run, tmp_path, capsys):
    flags = ["train.steps=8", "checkpoint.keep_newest=4"]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    for step in (5, -1, 100):
        from moejax import cli

        arguments = ["train", f"--config={file}", f"--workdir={run}", f"--resume-from={step}"]
        assert cli.main([*arguments, *(f"--config.{flag}" for flag in flags)]) == 2
        line = capsys.readouterr().err.strip()
        assert "\n" not in line and f"--resume-from = {step}: " in line
        assert line.endswith("has no checkpoint of that step; there are those of steps 2, 4, 6, 8")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    nowhere = ["train", f"--config={file}", f"--workdir={tmp_path / 'no'}", "--resume-from=2"]
    assert cli.main(nowhere) == 2
    assert "no run is there" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_what_was_given_up_does_not_come_back_after_a_kill(
    config, cache, run, whole, monkeypatch, capsys
):
    """Killed before anything was saved in the new future: it goes on from the step, and the run
    does not count as complete."""
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        eager = with_checkpoint(config, every_steps=5)
        patch.setattr(Checkpointer, "save", lambda *_, **__: False)
        with pytest.raises(RuntimeError, match="killed"):
            train(eager, str(run), programs=cache, resume_from=4)
    (run / "summary.json").write_text(json.dumps({**summary(whole), "status": "interrupted"}))
    capsys.readouterr()
    train(config, str(run), programs=cache)
    assert "resuming at step 4 of 8" in capsys.readouterr().err
    assert_same(run, whole)


def test_a_run_that_goes_back_is_not_complete_while_it_runs(config, cache, run, monkeypatch):
    seen = []
    real = Run.train
    monkeypatch.setattr(Run, "train", lambda r: seen.append(summary(run)["status"]) or real(r))
    train(config, str(run), programs=cache, resume_from=6)
    assert seen == ["interrupted"] and summary(run)["status"] == "completed"


def test_a_damaged_step_is_refused_and_nothing_is_given_up(config, cache, run, capsys):
    from moejax.training.loop import RunFailed

    largest = max((run / "checkpoints" / "4").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(RunFailed, match="checkpoint of step 4 refused"):
        train(config, str(run), programs=cache, resume_from=4)
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == [2, 4, 6, 8]


# Local copies


@pytest.fixture()
def hot(config, tmp_path):
    return with_checkpoint(config, every_steps=6, local_dir=str(tmp_path / "local"), local_every=1)


def copies(config):
    """Steps of the local copies, of all runs that share the folder."""
    return sorted(
        int(p.parent.name) for p in pathlib.Path(config.checkpoint.local_dir).rglob("manifest.json")
    )


def wait_for_copies(monkeypatch):
    """Every step is copied: none is left out because the one before it is being written."""
    real = local_copies.LocalCopies.copy

    def copy(self, *arguments):
        self.finalize()
        real(self, *arguments)

    monkeypatch.setattr(local_copies.LocalCopies, "copy", copy)


def killed_at(config, workdir, cache, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, str(workdir), programs=cache)


def test_a_restart_goes_on_from_the_newest_copy_and_a_complete_run_leaves_none(
    hot, cache, whole, tmp_path, monkeypatch, capsys
):
    wait_for_copies(monkeypatch)
    workdir = tmp_path / "run"
    killed_at(hot, workdir, cache, monkeypatch, 5)
    assert copies(hot) == [4, 5] and not (workdir / "checkpoints").exists()
    capsys.readouterr()
    train(hot, str(workdir), programs=cache)
    said = capsys.readouterr().err
    assert "the checkpoint of step 5 is a local copy in" in said
    assert "the run directory's newest is none" in said and "resuming at step 5 of 8" in said
    assert_same(workdir, whole)
    assert losses(workdir) == losses(whole)
    assert read(workdir)["redone"]["steps"] == 0
    assert list((tmp_path / "local").iterdir()) == []


def test_damaged_and_missing_copies_fall_back(hot, cache, whole, tmp_path, monkeypatch, capsys):
    """Killed after step 7: copies of 5 and 7 (6 is a checkpoint of the run directory)."""
    wait_for_copies(monkeypatch)
    workdir = tmp_path / "run"
    killed_at(hot, workdir, cache, monkeypatch, 7)
    assert copies(hot) == [5, 7]
    (folder,) = (tmp_path / "local").iterdir()
    largest = max((folder / "7").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-3])
    capsys.readouterr()
    again = pathlib.Path(shutil.copytree(workdir, tmp_path / "kept"))
    train(hot, str(workdir), programs=cache)
    said = capsys.readouterr().err
    assert "checkpoint of step 7 refused" in said and str(folder) in said
    assert "going back to the checkpoint of step 6" in said and "resuming at step 6" in said
    assert_same(workdir, whole)
    # On another machine, where there are none.
    train(hot, str(again), programs=cache)
    assert "resuming at step 6 of 8" in capsys.readouterr().err
    assert_same(again, whole)


def test_runs_that_share_a_folder_do_not_mix(hot, cache, whole, tmp_path, monkeypatch, capsys):
    wait_for_copies(monkeypatch)
    killed_at(hot, tmp_path / "a", cache, monkeypatch, 5)
    other = dataclasses.replace(hot, seed=1)
    killed_at(other, tmp_path / "b", cache, monkeypatch, 3)
    assert len(list((tmp_path / "local").iterdir())) == 2
    capsys.readouterr()
    train(hot, str(tmp_path / "a"), programs=cache)
    assert "resuming at step 5 of 8" in capsys.readouterr().err
    assert_same(tmp_path / "a", whole)
    train(other, str(tmp_path / "b"), programs=cache)
    assert "resuming at step 3 of 8" in capsys.readouterr().err
    # The same config in another folder is another run.
    train(hot, str(tmp_path / "c"), programs=cache)
    assert "resuming" not in capsys.readouterr().err


def test_copies_of_a_future_that_was_given_up_are_not_taken(
    hot, cache, whole, tmp_path, monkeypatch, capsys
):
    """They lie on another machine while the run goes back on this one, and it then returns."""
    wait_for_copies(monkeypatch)
    workdir = tmp_path / "run"
    killed_at(hot, workdir, cache, monkeypatch, 7)
    shutil.copytree(tmp_path / "local", tmp_path / "elsewhere")
    killed_at_once = with_checkpoint(hot, local_dir="", local_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", lambda run: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            train(killed_at_once, str(workdir), programs=cache, resume_from=6)
    capsys.readouterr()
    there = with_checkpoint(hot, local_dir=str(tmp_path / "elsewhere"))
    train(there, str(workdir), programs=cache)
    assert "resuming at step 6 of 8" in capsys.readouterr().err
    assert_same(workdir, whole)


def test_a_folder_that_cannot_be_written_is_one_line(file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {tmp_path / "file" / "in": "is a file", pathlib.Path("/proc/x"): "cannot be written"}
    for place, why in places.items():
        settings = (f"checkpoint.local_dir={place}", "checkpoint.local_every=2")
        assert command(file, tmp_path / "run", *settings) == 2
        line = capsys.readouterr().err.strip()
        assert "checkpoint.local_dir" in line and why in line and "\n" not in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"does not go with checkpoint.local_dir = ''"):
        run_config.load(str(file), ["checkpoint.local_every=2"])


def test_a_full_local_disk_stops_nothing(hot, cache, whole, tmp_path, monkeypatch, capsys):
    wait_for_copies(monkeypatch)
    real = local_copies.LocalCopies.save

    def full(self, step, *arguments):
        self._fail(step, OSError(28, "No space left on device"))
        self._report()
        return real(self, step, *arguments) if step == 7 else False

    monkeypatch.setattr(local_copies.LocalCopies, "save", full)
    result = train(hot, str(tmp_path / "run"), programs=cache)
    said = capsys.readouterr().err
    assert "warning: local copy in" in said and "no space left on the device" in said
    assert result["status"] == "completed" and result["failed_saves"] == []
    assert_same(tmp_path / "run", whole)
