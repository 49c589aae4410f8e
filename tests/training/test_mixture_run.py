"""A run on a mixture: what it says, counts and refuses, and that it resumes bit by bit."""

import json
import pathlib

import numpy as np
import pytest
from runs import train, write_config
from sharded_batches import assert_input_keeps_up

from moejax import cli
from moejax.data import DataConfig
from moejax.training import run_config, run_dir
from moejax.training.data_account import InputWait
from moejax.training.metrics import read_metrics


def mixture(config: pathlib.Path, **weights) -> list[str]:
    """Overrides that make a mixture of the tiny corpus and a second one, by weight."""
    notes = config.parent / "notes.jsonl"
    texts = [f"note {i}: " + "remember the milk, " * (1 + i % 5) for i in range(30)]
    notes.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, texts[3]]))
    blocks = [
        {"source": "text", "path": str(config.parent / "corpus"), "label": "made"},
        {"source": "text", "path": str(notes), "label": "notes"},
    ]
    for block in blocks:
        if weights:
            block["weight"] = weights[block["label"]]
    return ["data.source=stdlib", "data.path=''", f"data.mixture={blocks!r}"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def settings(config):
    """A mixture of one part made-up sentences and three parts notes, and validations."""
    return [
        *mixture(config, made=1, notes=3), "data.deduplicate=exact", "train.steps=20",
        "train.eval_every=2", "train.eval_batches=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(config, settings, tmp_path_factory):
    """A run without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(config, workdir, *settings) == 0
    return workdir


def read(workdir: pathlib.Path, name: str) -> dict:
    return json.loads((workdir / name).read_text())


def test_the_summary_counts_epochs_and_judges_each_source(whole):
    summary, record = read(whole, "summary.json"), read(whole, "config.json")
    sources = summary["sources"]
    assert list(sources) == ["made", "notes"] == list(record["data"]["sources"])
    assert (sources["made"]["share"], sources["notes"]["share"]) == (0.25, 0.75)
    tokens = {label: own["train_tokens"] for label, own in sources.items()}
    rows = 20 * 8
    for label, own in sources.items():
        # A row of 32 is nearly full, so that epochs are tokens drawn over tokens there are.
        drawn = own["share"] * rows * 32
        assert own["epochs"] == pytest.approx(drawn / tokens[label], rel=0.1)
        assert set(own["baselines"]) == {"unigram", "gzip"}
        assert 0 < own["val_bits_per_byte"] < 9
    mean = sum(sources[label]["epochs"] * tokens[label] for label in tokens) / sum(tokens.values())
    assert summary["epochs"] == pytest.approx(mean)
    # The whole is the sources' held-out text, each target once.
    last = read_metrics(whole)[-1]
    counts = record["data"]["sources"]
    assert last["val_bits_per_byte"] == summary["val_bits_per_byte"]
    assert summary["val_loss"] == pytest.approx(
        np.average(
            [sources[label]["val_loss"] for label in tokens],
            weights=[_held_out(whole, label) for label in tokens],
        )
    )
    assert counts["notes"]["duplicate_documents"] == 1
    assert record["data"]["fingerprint"] == summary["data_fingerprint"]


def _held_out(workdir: pathlib.Path, label: str) -> int:
    """Held-out targets of a source, opened again from the recorded config."""
    from moejax.data import open_dataset

    config = run_config.from_dict(read(workdir, "config.json")["config"])
    found = open_dataset(config.data, seq_len=32, vocab_size=260)
    return next(p.dataset.validation_tokens for p in found.parts if p.label == label)


def test_metrics_follow_epochs_and_each_source(whole):
    rows = read_metrics(whole)
    steps = [row for row in rows if "epochs" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert (np.diff([row["epochs/notes"] for row in steps]) > 0).all()
    summary = read(whole, "summary.json")
    assert steps[-1]["epochs"] == summary["epochs"]
    assert steps[-1]["epochs/made"] == summary["sources"]["made"]["epochs"]
    validations = [row for row in rows if "val_loss" in row]
    assert len(validations) == 10
    for row in validations:
        for label in ("made", "notes"):
            assert 0 < row[f"val/{label}/bits_per_byte"] < 9
            assert row[f"val/{label}/loss"] > 0
    assert validations[-1]["val/notes/loss"] == summary["sources"]["notes"]["val_loss"]


def test_what_is_said_before_and_after(config, settings, tmp_path, capsys):
    assert train(config, tmp_path / "run", *settings, "train.steps=150", "budget.max_flops=1") == 0
    said = capsys.readouterr().err
    assert "made    25.00% of the tokens" in said and "notes   75.00% of the tokens" in said
    assert "notes: dropped 1 of 31 documents as copies" in said
    assert "warning: read more than 4 times: notes" in said or "more than 4 epochs" in said
    assert train(config, tmp_path / "more", *settings) == 0
    said = capsys.readouterr().err
    assert "bits/byte by source: made " in said and "input       waited for in " in said


def test_a_resumed_run_goes_through_the_same_rows(config, settings, whole, tmp_path):
    workdir = tmp_path / "run"
    flops = read(whole, "summary.json")["model_flops"]
    assert train(config, workdir, *settings, f"budget.max_flops={flops / 2}") == 0
    stopped = read(workdir, "summary.json")
    assert 0 < stopped["step"] < 20 and stopped["epochs"] > 0
    assert train(config, workdir, *settings) == 0
    left, right = read(whole, "summary.json"), read(workdir, "summary.json")
    for name in ("step", "loss", "val_loss", "epochs", "sources", "data_fingerprint"):
        assert left[name] == right[name]
    losses = lambda where: [row["loss"] for row in read_metrics(where) if "loss" in row]
    assert losses(whole) == losses(workdir)


def test_evaluate_takes_the_sources_for_domains_and_the_report_names_them(whole, capsys):
    assert cli.main(["evaluate", f"--workdir={whole}"]) == 0
    found = read(whole, "evaluate.json")
    by_name = {own["name"]: own for own in found["domains"]}
    sources = read(whole, "summary.json")["sources"]
    assert set(by_name) == set(sources)
    for label, own in sources.items():
        assert by_name[label]["bits_per_byte"] == pytest.approx(own["val_bits_per_byte"], rel=1e-3)
    assert cli.main(["report", str(whole)]) == 0
    page = (whole / "report.html").read_text()
    assert "mixture of made, notes" in page and "source notes" in page
    assert cli.main(["inspect", f"--workdir={whole}", "--batches=1"]) == 0


def test_a_mixture_that_cannot_be_used_is_one_line_and_writes_nothing(config, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    good = mixture(config)
    cases = {
        "data.mixture[1].weight=-1": "data.mixture[1].weight = -1.0: must be above zero",
        "data.mixture[0].weight=1": "give every source of data.mixture a weight",
        "data.mixture[0].source=webb": "data.mixture[0].source = 'webb'",
        "data.mixture[7].weight=1": "there is no such entry; the list has 2",
        "data.temperature=0": "data.temperature = 0.0: must be above zero",
        "data.path=/x": "data.path = '/x': is set beside data.mixture",
        f"data.mixture[1].path={tmp_path / 'empty'}": "data.mixture[1].path = ",
        f"data.mixture[1].path={config.parent / 'corpus'}": "is the same source as data.mixture[0]",
        "data.mixture=[]": None,
    }
    for setting, message in cases.items():
        status = train(config, tmp_path / "run", *good, setting, "budget.max_flops=1")
        said = capsys.readouterr().err
        if message is None:  # no mixture: the standard library
            assert status == 0 and "sources" not in read(tmp_path / "run", "summary.json")
            continue
        assert status == 2 and message in said and said.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_a_run_of_before_there_were_mixtures_goes_on(config, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(config, workdir, "budget.max_flops=1") == 0
    record = read(workdir, "config.json")
    for name in ("mixture", "temperature", "deduplicate"):
        del record["config"]["data"][name]
    (workdir / "config.json").write_text(json.dumps(record))
    assert train(config, workdir, "train.steps=6") == 0
    assert read(workdir, "summary.json")["status"] == "completed"
    capsys.readouterr()
    assert train(config, workdir, "data.deduplicate=exact") == 2
    assert "data.deduplicate ('none' -> 'exact')" in capsys.readouterr().err


def test_tokenize_writes_a_folder_for_each_source(config, tmp_path, capsys):
    flags = [f"--config.{setting}" for setting in mixture(config)]
    out = tmp_path / "shards"
    assert cli.main(["tokenize", f"--config={config}", f"--out={out}", *flags]) == 0
    assert "train on it with data.mixture=[" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["made", "notes"]


def test_one_source_counts_epochs_too(config, tmp_path):
    assert train(config, tmp_path / "run") == 0
    summary = read(tmp_path / "run", "summary.json")
    assert "sources" not in summary
    config = run_config.from_dict(run_dir.read_record(tmp_path / "run")["config"])
    assert config.data == DataConfig(source="text", path=config.data.path)
    assert summary["epochs"] == read_metrics(tmp_path / "run")[-2]["epochs"] > 0
    assert 0 <= summary["data_wait_share"] <= 1


def test_the_share_of_waiting_leaves_the_first_step_out():
    wait = InputWait()
    assert wait.share({"data_wait": 0.0, "train": 0.0}) is None and wait.line({}) == ""
    wait.step({"data_wait": 5.0, "train": 20.0})
    assert wait.share({"data_wait": 5.0, "train": 20.0}) is None
    for step in range(1, 5):
        wait.step({"data_wait": 5.0 + 0.25 * step, "train": 20.0 + 0.75 * step})
    now = {"data_wait": 6.0, "train": 23.0}
    assert wait.share(now) == 0.25
    assert wait.line(now).startswith("input       waited for in 25.00% of the steps' time; warning")
    assert "warning" not in wait.line({"data_wait": 5.005, "train": 23.0})
    with pytest.raises(AssertionError, match=r"waited for input in 0\.25"):
        assert_input_keeps_up({"data_wait_share": wait.share(now)})
