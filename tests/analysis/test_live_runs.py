"""What notebooks train and show of it; training itself is in the notebooks' own test."""

import json
import pathlib

import pytest

from moejax.analysis import live_runs
from moejax.config import ConfigError

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"


@pytest.fixture(autouse=True)
def _in_the_notebooks_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setenv(live_runs.RUNS, str(tmp_path))
    monkeypatch.delenv(live_runs.SMALL, raising=False)


def test_the_small_mode_is_smaller_and_kept_apart(monkeypatch):
    full, where = live_runs.config(), live_runs.folder("run")
    monkeypatch.setenv(live_runs.SMALL, "1")
    tiny = live_runs.config()
    assert tiny.model.d_model < full.model.d_model
    assert tiny.train.steps < full.train.steps
    assert live_runs.folder("run") != where


def test_edits_change_fields_and_blocks():
    found = live_runs.config({"router": {"name": "hash"}, "optim.learning_rate": 0.5})
    assert found.model.moe.router.name == "hash"
    assert found.optim.learning_rate == 0.5
    with pytest.raises(ConfigError, match=r"train\.stepz"):
        live_runs.config({"train.stepz": 3})


def test_the_small_mode_trains_two_variants_with_two_seeds(monkeypatch):
    trained = []
    monkeypatch.setenv(live_runs.SMALL, "1")
    monkeypatch.setattr(live_runs, "train", lambda config, where, programs: trained.append(config))
    found = live_runs.runs({"a": {}, "b": {}, "c": {}}, seeds=3, steps=500, checkpoints=4)
    assert {name: len(folders) for name, folders in found.items()} == {"a": 2, "b": 2}
    assert [config.seed for config in trained] == [0, 1, 0, 1]
    assert {config.train.steps for config in trained} == {60}
    assert trained[0].checkpoint.every_steps == 15 and trained[0].checkpoint.keep_newest == 4


def made_run(folder, bits, violations):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"val_bits_per_byte": bits}))
    names = ("router/max_violation", "router/dead_experts", "loss")
    rows = [
        {"step": i, **dict(zip(names, (v, i, None), strict=True))} for i, v in enumerate(violations)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_tables_verdicts_and_curves(tmp_path):
    found = {
        name: [
            made_run(tmp_path / f"{name}{i}", bits + 0.001 * i * i, [9.0] + 5 * [violation])
            for i in range(4)
        ]
        for name, bits, violation in (("a", 2.0, 1.0), ("b", 1.5, 0.25))
    }
    lines = live_runs.table(found).splitlines()
    assert lines[1].split() == ["a0", "2.0000", "1.00", "5"]
    assert lines[-1].split() == ["b3", "1.5090", "0.25", "5"]
    assert live_runs.verdicts(found, "a") == "b against a: better by 0.5"
    (axes,) = live_runs.plot_curves(found, {"router/max_violation": "MaxVio"}).axes
    assert len(axes.lines) == 8
    steps, _ = live_runs.curve(found["a"][0], "loss")
    assert len(steps) == 0
