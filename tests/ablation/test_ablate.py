"""Whole ablations of a tiny model: what they leave, resuming, failures, ladders, processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ablations import ablate, results, write_ablation

from moejax.ablation import calibrate, grid, run, runners, spec
from moejax.ablation.record import Folder
from moejax.config import UserError
from moejax.cost.bill import summarize
from moejax.cost.hardware import cpu_cores
from moejax.training import restore
from moejax.training.loop import Interrupted
from moejax.training.programs import ProgramCache
from moejax.training.train import train

# A rate that no model survives; all else is the variant ``bias``, whose programs it shares.
DIVERGES = "--config.variants.diverges={'optim.learning_rate': 1e30}"


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """The ablations of this file share their compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        shared = ProgramCache()
        patch.setattr("moejax.ablation.runners.ProgramCache", lambda: shared)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_ablation(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An ablation of three variants, one of which diverges, that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("ablation") / "whole"
    assert ablate(config, workdir, DIVERGES) == 1
    return workdir


def losses(workdir: pathlib.Path) -> dict[str, tuple]:
    """What must be the same to the last digit, by cell."""
    names = ("status", "learning_rate", "steps", "tokens", "val_loss", "val_bits_per_byte", "loss")
    return {name: tuple(row[n] for n in names) for name, row in results(workdir).items()}


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(whole):
    rows = results(whole)
    assert [name for name, row in rows.items() if row["status"] == "failed"] == [
        "diverges-seed0", "diverges-seed1",
    ]  # fmt: skip
    failed = rows["diverges-seed1"]
    assert "loss nan" in failed["error"] or "gradient norm" in failed["error"]
    assert failed["val_loss"] is None and failed["charged"]["dollars"] > 0
    assert rows["bias-seed1"]["steps"] == rows["aux-seed1"]["steps"] == 6
    analysis = json.loads((whole / "analysis.json").read_text())
    assert [cell["id"] for cell in analysis["failed"]] == ["diverges-seed0", "diverges-seed1"]
    assert analysis["variants"]["bias"]["difference"]["pairs"] == 2


def test_the_folder_holds_what_it_was_and_what_it_cost(config, whole):
    about = json.loads((whole / "ablation.json").read_text())
    assert about["spec"]["variants"]["diverges"] == {"optim.learning_rate": 1e30}
    assert about["command"].startswith("moejax ablate --config=") and len(about["data"]) == 3
    assert about["packages"]["jax"] == jax.__version__
    plan = json.loads((whole / "plan.json").read_text())
    assert plan["planned"]["cells"] == 6 and plan["calibration"] == {}
    bill = summarize([whole / "runs"])
    assert bill["total"]["headline"]["runs"] == 0 and bill["total"]["all_in"]["runs"] == 6
    assert set(bill["total"]["by_stage"]) == {"ablation"}
    rows = results(whole).values()
    charged = sum(row["charged"]["dollars"] for row in rows)
    assert charged == pytest.approx(bill["total"]["all_in"]["dollars"], rel=1e-6)
    row = results(whole)["bias-seed0"]
    assert row["dollars"] < row["charged"]["dollars"]  # of the training steps only
    assert row["device_seconds"] == pytest.approx(row["train_seconds"] * row["devices"])
    assert len(row["max_violation_by_layer"]) == 1 and row["dropped_share"] == 0
    assert len(row["fingerprint"]) == 64
    assert not list(whole.glob("runs/*/checkpoints"))  # keep_checkpoints = False


def test_a_complete_ablation_is_left_alone(config, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("runs/*/*")}
    rows = (whole / "results.jsonl").read_bytes()
    assert ablate(config, whole, DIVERGES, "--format=json") == 1
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["status"] == "failed" and len(outcome["failures"]) == 2
    assert outcome["analysis"]["metric"] == "val_bits_per_byte"
    assert (whole / "results.jsonl").read_bytes() == rows
    assert {path: path.stat().st_mtime_ns for path in whole.glob("runs/*/*")} == before


def test_interrupted_torn_and_resumed_equals_uninterrupted(
    config, whole, tmp_path, monkeypatch, capsys
):
    """In another folder: asked to stop in the second cell, whose line is torn as well."""
    begun = []

    def stopped(*arguments, **options):
        begun.append(arguments)
        if len(begun) == 2:
            raise Interrupted("asked to stop")
        return train(*arguments, **options)

    monkeypatch.setattr("moejax.ablation.runners.train", stopped)
    workdir = tmp_path / "ablation"
    assert ablate(config, workdir, DIVERGES) == 1
    assert "the same command goes on from here" in capsys.readouterr().err
    assert list(results(workdir)) == ["bias-seed0"]
    with open(workdir / "results.jsonl", "a") as file:
        file.write('{"id": "aux-se')
    assert ablate(config, workdir, DIVERGES) == 1
    assert losses(workdir) == losses(whole)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([DIVERGES, "--config.seeds=[0,2]"], "seeds ([0, 1] -> [0, 2])"),
        ([], "variants.diverges.optim.learning_rate (1e+30 -> None)"),
        ([DIVERGES, "--config.base.train.batch_size=4"], "base.train.batch_size (8 -> 4)"),
    ],
)
def test_an_edited_config_is_refused_and_its_field_named(config, whole, capsys, flags, words):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert ablate(config, whole, *flags) == 2
    line = capsys.readouterr().err.strip()
    assert words in line and "\n" not in line
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_other_devices_are_refused(config, whole, tmp_path, capsys):
    workdir = tmp_path / "ablation"
    workdir.mkdir()
    (workdir / "ablation.json").write_text((whole / "ablation.json").read_text())
    plan = json.loads((whole / "plan.json").read_text())
    plan["rates"]["aux"]["devices"] = 999
    (workdir / "plan.json").write_text(json.dumps(plan))
    assert ablate(config, workdir, DIVERGES) == 2
    assert "run on 999 x cpu each, and here on" in capsys.readouterr().err


def test_a_folder_with_something_else_is_refused(config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert ablate(config, tmp_path / "run") == 2
    assert "holds an ordinary run" in capsys.readouterr().err
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("mine")
    assert ablate(config, tmp_path / "files") == 2
    assert "give a new or an empty folder" in capsys.readouterr().err


def test_an_ablation_that_another_process_runs_is_refused(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moejax.ablation.record.LOCK_SECONDS", 0.2)
    with Folder(tmp_path / "ablation").held():
        assert ablate(config, tmp_path / "ablation") == 2
    assert "another process runs this ablation" in capsys.readouterr().err


def test_an_ablation_that_another_process_began_meanwhile_is_refused(
    config, tmp_path, monkeypatch, capsys
):
    """Its plan may have measured steps, and this process has read none."""
    real, plan = run._state, tmp_path / "ablation" / "plan.json"

    def slow(*arguments):
        state = real(*arguments)
        plan.parent.mkdir()
        plan.write_text("another's")
        return state

    monkeypatch.setattr(run, "_state", slow)
    assert ablate(config, plan.parent) == 2
    assert "has begun this ablation meanwhile" in capsys.readouterr().err
    assert plan.read_text() == "another's" and not (plan.parent / "ablation.json").exists()


def test_a_dry_run_writes_nothing_and_says_the_bill(config, tmp_path, capsys):
    flags = ["--config.budget.hold=device_seconds", "--config.budget.amounts=[100]", "--dry-run",
             "--config.budget.seconds_per_step={'bias': 0.1, 'aux': 0.2}"]  # fmt: skip
    assert ablate(config, tmp_path / "ablation", *flags) == 0
    said = capsys.readouterr().err
    assert "device-seconds" in said and "as measured" in said and "dollars" in said
    assert list(tmp_path.iterdir()) == []


def test_variants_of_equal_flops_are_planned_alike(config, tmp_path, monkeypatch):
    """A CPU's peak is measured for each of them, and is never the same twice."""
    peaks = iter([1e11, 3e11, 2e11])
    monkeypatch.setattr("moejax.cost.hardware.measure_cpu_peak", lambda: next(peaks))
    settings = ["variants={'a': {}, 'b': {'optim.learning_rate': 0.1}}", "reference=a"]
    planned = run.ablate(
        spec.load(str(config), settings), str(tmp_path / "ablation"), dry_run=True, say=str
    )["planned"]["by_kind"]["final"]
    monkeypatch.setattr("moejax.cost.hardware.measure_cpu_peak", lambda: 3e11)
    again = run.ablate(
        spec.load(str(config), settings), str(tmp_path / "ablation"), dry_run=True, say=str
    )["planned"]["by_kind"]["final"]
    assert planned == again


@pytest.mark.parametrize("hold", ["device_seconds", "tokens"])
def test_the_process_is_charged_once(config, tmp_path, monkeypatch, hold):
    """To the first run in it, be that the one that measures a step."""
    charged = []

    def measure(folder, found, variant, bill_process):
        charged.append((variant, bill_process))
        return {"seconds_per_step": 0.01, "low": 0.01, "high": 0.01}

    class Runner(run.InProcess):
        room = 0

        def __init__(self, folder, found, bill_process):
            charged.append(("cells", bill_process))

    monkeypatch.setattr(calibrate, "calibrate", measure)
    monkeypatch.setattr(run, "InProcess", Runner)
    flags = [f"--config.budget.hold={hold}", f"--config.budget.amounts=[{100 * cpu_cores()}]"]
    if hold == "tokens":
        flags = []
    assert ablate(config, tmp_path / "ablation", *flags) == 2  # no cell has ended
    measured = [("bias", True), ("aux", False)] if hold == "device_seconds" else []
    assert charged == [*measured, ("cells", not measured)]


def test_what_a_cell_begins_with_is_charged_to_it(config, tmp_path, monkeypatch):
    """A branch's copy of its trunk's checkpoint, say, comes before it trains."""
    given = []

    def trained(*_, begun, **__):
        given.append(time.monotonic() - begun)
        return {"status": "completed"}

    monkeypatch.setattr(runners, "train", trained)
    monkeypatch.setattr(runners, "_fork", lambda *_: time.sleep(0.2))
    found = spec.load(str(config), ["budget.amounts=[3000,6000]"])
    with Folder(tmp_path).held():
        cell = grid.Cell("x", "bias", 0, 3000.0, "branch", 0.1, 12, 1.0, 1.0, {}, from_step=6)
        assert runners.execute(Folder(tmp_path), found, cell, bill_process=False) is None
    assert given[0] >= 0.2


def test_measured_seconds_are_taken_from_another_ablation(config, tmp_path):
    plan = {"calibration": {"bias": {"seconds_per_step": 0.1}, "aux": {"seconds_per_step": 0.2}}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    settings = ["budget.hold=dollars", f"budget.seconds_per_step={tmp_path}"]
    found = spec.load(str(config), settings)
    assert found.budget.seconds_per_step == {"bias": 0.1, "aux": 0.2}
    (tmp_path / "plan.json").write_text(json.dumps({"calibration": {"bias": {}}}))
    with pytest.raises(UserError, match="calibration"):
        spec.load(str(config), settings)


# Slow: whole grids, in processes of their own where a kill is what is tested.


def environment() -> dict[str, str]:
    """As in this process: losses depend on the number of virtual devices."""
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}


def begin(config: pathlib.Path, workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    """``moejax ablate`` as a process of its own."""
    command = [sys.executable, "-m", "moejax.cli", "ablate", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(config, whole, tmp_path):
    """SIGKILL in the middle of the second cell's training, and again of the fourth's."""
    workdir, expected = tmp_path / "ablation", losses(whole)
    for cell in ("aux-seed0", "bias-seed1"):
        process = begin(config, workdir, DIVERGES)
        try:
            wait_for(lambda cell=cell: (workdir / "runs" / cell / "checkpoints" / "2").exists())
        finally:
            process.kill()
            process.communicate()
    process = begin(config, workdir, DIVERGES)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert losses(workdir) == expected
    bill = summarize([workdir / "runs"])
    statuses = [part["status"] for r in bill["runs"] if r["id"] == "aux-seed0"
                for part in r["segments"]]  # fmt: skip
    assert statuses == ["killed", "completed"]


@pytest.mark.slow
def test_a_killed_child_is_a_failed_cell_and_the_rest_goes_on(config, tmp_path):
    workdir = tmp_path / "ablation"
    slow = "--config.base.train.eval_every=1"
    process = begin(config, workdir, "--processes=1", slow, "--config.budget.amounts=[2560]")
    try:
        ledger = workdir / "runs" / "bias-seed0" / "ledger.jsonl"
        wait_for(ledger.exists)
        child = json.loads(ledger.read_text().splitlines()[0])["pid"]
        assert child != process.pid
        os.kill(child, signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1, said
    rows = results(workdir)
    assert rows["bias-seed0"]["status"] == "failed" and "SIGKILL" in rows["bias-seed0"]["error"]
    others = {row["status"] for name, row in rows.items() if name != "bias-seed0"}
    assert others == {"completed"} and len(rows) == 4
    assert "FAILED" in said and "SIGKILL" in said
    assert (workdir / "logs" / "aux-seed0.log").stat().st_size > 0


@pytest.mark.slow
def test_a_branch_equals_the_run_from_scratch(config, tmp_path):
    """A ladder of 8, 12 and 20 steps, tuned: every parameter and loss, bit for bit."""
    flags = ["--config.budget.amounts=[2048,3072,5120]", "--config.keep_checkpoints=last",
             "--config.tuning={'factors': [0.5, 1.0], 'seeds': [7]}"]  # fmt: skip
    workdir = tmp_path / "ablation"
    assert ablate(config, workdir, *flags) == 0
    plan = json.loads((workdir / "plan.json").read_text())
    rows = results(workdir)
    cells = {c["id"]: grid.Cell.from_dict(c) for c in plan["cells"]}
    found = spec.from_dict(json.loads((workdir / "ablation.json").read_text())["spec"])
    assert cells["aux-seed1-5120"].at_steps == (4, 6)
    for name in ("aux-seed1-2048", "bias-seed0-3072"):
        scratch = train(grid.cell_config(found, cells[name]), str(tmp_path / name))
        branch = json.loads((workdir / "runs" / name / "summary.json").read_text())
        for field in ("step", "tokens", "loss", "val_loss", "fingerprint"):
            assert branch[field] == scratch[field]
        pair = (restore.load(folder)[1] for folder in (workdir / "runs" / name, tmp_path / name))
        for ours, theirs in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        row, trunk = rows[name], cells[cells[name].trunk]
        assert row["tokens"] == scratch["tokens"]
        assert row["model_flops"] == pytest.approx(scratch["model_flops"], rel=0.02)
        # Charged are its own steps only; the trunk's first ones are the trunk's.
        own = (cells[name].steps - cells[name].from_step) / cells[name].steps
        assert row["charged"]["tokens"] == pytest.approx(own * row["tokens"], rel=0.05)
        assert trunk.kind == "trunk"
    chosen = plan["tuning"]["aux"]["chosen"]
    assert {c.learning_rate for c in cells.values() if c.variant == "aux" and c.kind != "tune"} == {
        chosen
    }
    assert len(list((workdir / "runs" / "aux-seed1-5120" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_a_budget_of_seconds_is_measured_once(config, tmp_path, monkeypatch):
    """The folder keeps its step counts; another that is given them has the same ones.

    What was measured is replaced once it was, so that a busy machine changes nothing here.
    """
    made, measured, real = {"bias": 0.005, "aux": 0.004}, [], calibrate.calibrate

    def measure(folder, found, variant, **options):
        measured.append(real(folder, found, variant, **options))
        return {**measured[-1], "seconds_per_step": made[variant]}

    monkeypatch.setattr(calibrate, "calibrate", measure)
    hold = ["budget.hold=device_seconds", f"budget.amounts=[{0.1 * cpu_cores()}]"]
    flags, workdir = [f"--config.{setting}" for setting in hold], tmp_path / "ablation"
    assert ablate(config, workdir, *flags) == 0
    for found in measured:
        assert 0 < found["low"] <= found["seconds_per_step"] <= found["high"]
        assert found["dollars"] > 0 and found["devices"] == cpu_cores()
    plan = json.loads((workdir / "plan.json").read_text())
    assert {cell["variant"]: cell["steps"] for cell in plan["cells"]} == {"bias": 20, "aux": 25}
    assert ablate(config, workdir, *flags) == 0
    assert json.loads((workdir / "plan.json").read_text()) == plan and len(measured) == 2
    found = spec.load(str(config), [*hold, f"budget.seconds_per_step={workdir}"])
    again = run.ablate(found, str(tmp_path / "again"), say=print)
    assert again["status"] == "completed" and len(measured) == 2
    assert losses(tmp_path / "again") == losses(workdir)
