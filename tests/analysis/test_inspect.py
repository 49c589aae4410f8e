"""``moejax inspect`` on a real run: its record, its figures, and every kind of bad input."""

import contextlib
import io
import json
import os
import pathlib
import shutil

import pytest

from moejax import cli
from moejax.analysis.inspect_figures import draw
from moejax.training.manifest import NAME

FIGURES = [
    "coactivation.svg", "domains.svg", "layers.svg", "load.svg", "masked_best_experts.svg",
    "saturation.svg", "vocabulary.svg",
]  # fmt: skip


def inspect(workdir, *flags) -> int:
    return cli.main(["inspect", f"--workdir={workdir}", *flags])


@pytest.fixture(scope="module")
def inspected(run, tmp_path_factory):
    """The one object on standard output for all of the held-out text; its output is elsewhere."""
    output = tmp_path_factory.mktemp("output") / "new" / "inspect"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert inspect(run, "--format=json", "--batches=99", f"--output={output}") == 0
    assert "Traceback" not in err.getvalue() and "left out" not in err.getvalue()
    return json.loads(out.getvalue())


@pytest.fixture
def copy(run, tmp_path):
    """The run again, to be spoilt."""
    return pathlib.Path(shutil.copytree(run, tmp_path / "run"))


def test_what_a_run_gives(run, inspected):
    result = inspected
    assert result["step"] == 6 and result["checkpoints"] == [2, 4, 6]
    record = json.loads((run / "config.json").read_text())
    assert result["fingerprint"] == record["fingerprint"]
    assert result["layers"] == [1, 2] and result["num_experts"] == 4 and result["top_k"] == 2
    # All batches are the run's whole held-out text.
    summary = json.loads((run / "summary.json").read_text())
    assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-4)
    measures = result["by_layer"]
    assert all(len(values) == 2 for values in measures.values())
    assert measures["experts_per_token"] == [2, 2] and measures["dropped_share"] == [0, 0]
    for batch, whole in zip(
        measures["max_violation_batch"], measures["max_violation_global"], strict=True
    ):
        assert batch >= whole - 1e-4
    for name in ("bias_spread", "router_gradient_norm", "loss_sequence", "gate_entropy"):
        assert min(measures[name]) > 0
    assert all(-1 <= value <= 1 for value in measures["output_redundancy"])
    assert all(0.5 <= value <= 1 for value in measures["vocabulary_input"])
    for load in result["load"] + result["gate_mass"]:
        assert sum(load) == pytest.approx(1, abs=1e-3)


def test_the_measures_of_tokens(inspected):
    result = inspected
    for layer in result["coactivation"]:
        # Every token has two experts: a row is 1 on the diagonal and 1 beside it.
        assert [sum(row) for row in layer] == pytest.approx([2] * 4, abs=1e-3)
    saturation, flips = result["saturation"], result["flip_rate"]
    assert saturation["reference"] == 6 and saturation["steps"] == [2, 4, 6]
    assert saturation["by_layer"][-1] == [1, 1]
    assert all(0 < share < 1 for share in saturation["by_layer"][0])
    assert flips["steps"] == [[2, 4], [4, 6]]
    # A token that flips changes one of its experts or both.
    for flip, share in zip(flips["by_layer"][-1], saturation["by_layer"][1], strict=True):
        assert 1 - share <= flip + 1e-4 <= 2 * (1 - share) + 2e-4
    domains = result["domains"]
    assert sorted(domains["names"]) == ["even", "odd"]
    assert sum(domains["tokens"]) == result["tokens"]
    for layer in domains["share"]:
        for domain in range(2):
            assert sum(row[domain] for row in layer) == pytest.approx(2, abs=1e-3)
    text, share, times = result["vocabulary"]["input"][0][0][0]
    assert isinstance(text, str) and 0 < share <= 1 and times >= 8
    curve = result["masked_best_experts"]
    assert curve["masked"] == [0, 1, 2]
    assert curve["loss"][0] == result["loss"] and len(set(curve["loss"])) == 3
    assert curve["experts_per_token"][0] == 2 and min(curve["experts_per_token"]) > 1.8
    assert result["left_out"] == {}


def test_the_figures_and_the_record_are_written(inspected, tmp_path):
    output = pathlib.Path(inspected["output"])
    assert sorted(os.listdir(output)) == sorted(["inspect.json", *FIGURES]) == inspected["files"]
    stored = json.loads((output / "inspect.json").read_text())
    assert {**stored, "output": str(output), "files": inspected["files"]} == inspected
    for name in FIGURES:
        assert "</svg>" in (output / name).read_text()
    # The record is all that the figures need, and the same record gives the same files.
    for file in draw({**stored, "domains": None}, tmp_path):
        assert file.read_bytes() == (output / file.name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == [name for name in FIGURES if name != "domains.svg"]


def test_an_earlier_checkpoint_as_tables_in_the_runs_folder(copy, capsys):
    assert inspect(copy, "--step=2") == 0
    said = capsys.readouterr()
    assert "checkpoint of step 2" in said.out and "overlap with the experts at step 6" in said.out
    for heading in ("MaxVio", "likeness", "flips 2", "nats/token", "odd", "expert"):
        assert heading in said.out
    assert str(copy / "inspect") in said.out
    assert max(len(line) for line in said.out.splitlines() if "inspect" not in line) < 130
    assert sorted(os.listdir(copy / "inspect")) == sorted(["inspect.json", *FIGURES])


def damage(folder: pathlib.Path) -> None:
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_aloud(copy, capsys):
    for step in (2, 6):
        damage(copy / "checkpoints" / str(step))
    assert inspect(copy, "--format=json", "--batches=1") == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["step"] == 4
    for step in (2, 6):
        assert f"left out: checkpoint of step {step} refused" in said.err
    # One good checkpoint is left, and one batch of one document.
    assert result["saturation"] is None and result["domains"] is None
    assert "one good checkpoint" in result["left_out"]["saturation"]
    assert "raise --batches" in result["left_out"]["domains"]
    assert {"saturation.svg", "domains.svg"}.isdisjoint(os.listdir(copy / "inspect"))


@pytest.mark.parametrize("step", [2, 6])
def test_a_damaged_checkpoint_that_is_asked_for_is_refused(step, copy, capsys):
    damage(copy / "checkpoints" / str(step))
    line = refused(capsys, copy, f"--step={step}")
    assert f"--step = {step}: checkpoint of step {step} refused" in line
    assert "SHA-256" in line and "choose another" in line


# Bad input: one line, status 2, nothing written.


def refused(capsys, workdir, *flags) -> str:
    """The one line on standard error; the folder above the run holds what it held."""
    above = pathlib.Path(workdir).parent
    before = sorted(above.rglob("*")) if above.exists() else None
    capsys.readouterr()
    assert inspect(workdir, *flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    assert before == (sorted(above.rglob("*")) if above.exists() else None)
    return said.err


@pytest.fixture
def spoilt(run, tmp_path):
    """Writes a run of a config.json alone, with some of its values changed."""

    def write(change) -> pathlib.Path:
        record = json.loads((run / "config.json").read_text())
        change(record)
        folder = tmp_path / "spoilt"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(record))
        return folder

    return write


def test_no_such_folder(tmp_path, capsys):
    line = refused(capsys, tmp_path / "none")
    assert "--workdir" in line and "none" in line and "give a run's folder" in line


def test_not_a_run(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    line = refused(capsys, tmp_path / "other")
    assert "--workdir" in line and "no run is there" in line
    (tmp_path / "other" / "config.json").write_text("{")
    assert "config.json" in refused(capsys, tmp_path / "other")


def test_a_dense_model(spoilt, capsys):
    def dense(record):
        del record["config"]["moe"], record["config"]["router"]

    line = refused(capsys, spoilt(dense))
    assert "--workdir" in line and "dense" in line and "block moe" in line


def test_no_checkpoint(spoilt, capsys):
    assert "no checkpoint yet; train on" in refused(capsys, spoilt(lambda record: None))


def test_a_step_that_is_not_there(run, capsys):
    line = refused(capsys, run, "--step=5")
    assert "--step = 5" in line and "2, 4, 6" in line


@pytest.mark.parametrize("batches", ["0", "-1"])
def test_no_batches(run, batches, capsys):
    assert f"--batches = {batches}: must be above zero" in refused(
        capsys, run, f"--batches={batches}"
    )


def test_outputs_that_cannot_be(run, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("my only copy")
    folders = {
        file: "is a file",
        file / "results": "is a file",
        tmp_path: "no earlier inspect.json",
        pathlib.Path("/proc/results"): "cannot be written",
    }
    for folder, reason in folders.items():
        line = refused(capsys, run, f"--output={folder}")
        assert reason in line and f"--output = '{folder}'" in line
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "my only copy"


def test_text_that_is_not_the_runs(copy, capsys):
    record = json.loads((copy / "config.json").read_text())
    record["data"]["fingerprint"] = "of another text"
    (copy / "config.json").write_text(json.dumps(record))
    line = refused(capsys, copy)
    assert line.startswith("moejax inspect: data = ") and "restore the text" in line
    record["config"]["data"]["path"] = "/no/such/corpus"
    (copy / "config.json").write_text(json.dumps(record))
    assert "data.path = '/no/such/corpus'" in refused(capsys, copy)


def test_a_checkpoint_without_its_manifest_does_not_count(copy, capsys):
    (copy / "checkpoints" / "2" / NAME).unlink()
    assert "choose from 4, 6" in refused(capsys, copy, "--step=2")
