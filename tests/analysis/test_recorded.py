"""Recorded ablations in a notebook; both branches of the notebook itself: ``test_notebooks``."""

import json
import pathlib

import pytest
from made_ablation import made_grid, write_ablation

from moejax.analysis import recorded
from moejax.config import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_ABLATIONS", str(tmp_path))
    return tmp_path


def test_nothing_recorded(folder):
    assert recorded.ablation("none") is None
    assert recorded.command("none") in recorded.show("none", None)
    assert recorded.plot_verdicts(None) is None


def test_the_figure_has_a_line_a_variant_and_a_point_each(folder):
    means = {"a": 2.0, "b": 1.7, "c": 2.0}
    rows = made_grid(means, range(4), cost=lambda name: {"max_violation": means[name]})
    write_ablation(folder / "made", rows, variants=list(means), seeds=range(4), amounts=[1e6])
    left, right = recorded.plot_verdicts(recorded.ablation("made")).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["b", "c"]
    assert len(right.lines) == 3


def test_an_analysis_that_is_there_is_read(folder):
    (folder / "made").mkdir()
    (folder / "made" / "analysis.json").write_text(json.dumps({"name": "kept"}))
    assert recorded.ablation("made") == {"name": "kept"}
    (folder / "made" / "analysis.json").write_text("{")
    with pytest.raises(UserError, match=r"analysis\.json is damaged"):
        recorded.ablation("made")


def test_router_costs_are_the_recorded_ones(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    costs = recorded.router_costs()
    assert costs["expert_choice"][1] and not costs["deepseek_v3"][1]
    assert 0 < costs["random"][0] < costs["deepseek_v3"][0] < costs["autonomy"][0] < 1
    assert len(recorded.plot_router_costs().axes[0].patches) == len(costs)
