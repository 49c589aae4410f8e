"""``moejax evaluate`` on a real run: its record, its tables, and every kind of bad input."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import sys

import pytest

from moejax import cli
from moejax.analysis import harness

DOMAIN = {
    "name", "documents", "tokens", "bytes", "nats_per_token", "bits_per_byte", "interval",
    "unigram", "gzip",
}  # fmt: skip


def evaluate(workdir, *flags) -> int:
    return cli.main(["evaluate", f"--workdir={workdir}", *flags])


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """The one object on standard output for all of the held-out text; its output is elsewhere."""
    output = tmp_path_factory.mktemp("output") / "new"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert evaluate(run, "--format=json", f"--output={output}") == 0
    assert "Traceback" not in err.getvalue()
    return json.loads(out.getvalue())


@pytest.fixture
def copy(run, tmp_path):
    """The run again, to be written to."""
    return pathlib.Path(shutil.copytree(run, tmp_path / "run"))


def test_the_whole_text_has_the_figures_of_the_runs_summary(run, evaluated):
    summary = json.loads((run / "summary.json").read_text())
    total = evaluated["total"]
    assert evaluated["step"] == 6 and evaluated["fingerprint"] == summary["fingerprint"]
    assert total["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-4)
    assert total["nats_per_token"] == pytest.approx(summary["val_loss"], rel=1e-4)
    for name, value in summary["baselines"].items():
        assert total[name] == pytest.approx(value, rel=1e-4)
    assert evaluated["batches"]["run"] == evaluated["batches"]["of"]
    low, high = total["interval"]
    assert low < total["bits_per_byte"] < high < low + 1
    assert evaluated["leaks"] == [] and evaluated["lm_eval"] is None


def test_domains_add_up_to_the_whole(evaluated):
    domains, total = evaluated["domains"], evaluated["total"]
    assert sorted(domain["name"] for domain in domains) == ["even", "odd"]
    assert evaluated["kind"] == "top-level folder" and evaluated["why"] is None
    for domain in [*domains, total]:
        assert set(domain) == DOMAIN
    for name in ("documents", "tokens", "bytes"):
        assert sum(domain[name] for domain in domains) == total[name]
    for name in ("bits_per_byte", "unigram"):
        mean = sum(domain[name] * domain["bytes"] for domain in domains) / total["bytes"]
        assert mean == pytest.approx(total[name], rel=1e-4)


def test_the_record_is_what_was_printed(evaluated):
    file = pathlib.Path(evaluated["output"])
    stored = json.loads(file.read_text())
    assert {**stored, "output": str(file)} == evaluated
    assert os.listdir(file.parent) == ["evaluate.json"]


def test_an_earlier_checkpoint_in_part_in_the_runs_folder(copy, evaluated, capsys):
    assert evaluate(copy, "--step=2", "--batches=1") == 0
    said = capsys.readouterr().out
    stored = json.loads((copy / "evaluate.json").read_text())
    assert stored["step"] == 2 and stored["batches"]["run"] == 1
    assert stored["total"]["bits_per_byte"] > evaluated["total"]["bits_per_byte"]
    for words in ("step 2", "1 of", "by top-level folder", "(all)", "gzip -9"):
        assert words in said
    # Once more, over its own earlier record.
    assert evaluate(copy, "--step=4", "--batches=1") == 0
    assert json.loads((copy / "evaluate.json").read_text())["step"] == 4


# Bad input: one line, status 2, nothing written.


def refused(capsys, workdir, *flags) -> str:
    """The one line on standard error; the folder above the run holds what it held."""
    above = pathlib.Path(workdir).parent
    before = sorted(above.rglob("*"))
    capsys.readouterr()
    assert evaluate(workdir, *flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err and before == sorted(above.rglob("*"))
    return said.err


BAD_FLAGS = {
    "--batches=0": "--batches = 0: must be above zero",
    "--limit=-1": "--limit = -1: must be above zero",
    "--limit=3": "name some, or leave it out",
    "--lm-eval=,": "names no task",
    "--step=5": "choose from 2, 4, 6",
}  # fmt: skip


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_flags_out_of_range(run, flag, capsys):
    assert BAD_FLAGS[flag] in refused(capsys, run, flag)


def test_no_run_and_no_checkpoint(run, tmp_path, capsys):
    assert "give a run's folder" in refused(capsys, tmp_path / "none")
    (tmp_path / "bare").mkdir()
    shutil.copy(run / "config.json", tmp_path / "bare")
    assert "no checkpoint yet; train on" in refused(capsys, tmp_path / "bare")


def test_an_output_that_holds_something_else(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "no earlier evaluate.json" in refused(capsys, run, f"--output={tmp_path}")


def test_without_the_extra_its_name_is_told(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused(capsys, run, "--lm-eval=arc_easy")
    assert "pip install 'moejax[eval]'" in line


def test_the_harness_results_are_read_by_metric():
    values = {
        "alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 1.0,
        "exact_match_stderr,strict": "N/A", "sample_len": 3,
    }  # fmt: skip
    assert harness._metrics(values) == {
        "acc": {"value": 0.5, "stderr": 0.1},
        "exact_match/strict": {"value": 1.0, "stderr": None},
    }
