"""The pull of a balance loss on a router."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny

from moejax.analysis import balance_runs


def test_the_recorded_table(monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[2] / "notebooks")
    lines = balance_runs.recorded_rules().splitlines()
    assert lines[0].split() == ["rule", "0", "1", "6", "30", "100", "300", "999"]
    assert lines[-1].split()[:3] == ["quantile", "3.109", "0.217"]


def pull(weight):
    options = {"balance_loss_weight": weight}
    config = tiny.moe_config("top_k", options=options)
    batch = {
        field.name: np.asarray(getattr(tiny.batch(), field.name)[0])
        for field in dataclasses.fields(tiny.batch())
        if getattr(tiny.batch(), field.name) is not None
    }
    return balance_runs._pull(config, 7, tiny.variables(config), batch)


@pytest.mark.slow
def test_the_pull_grows_with_the_weight_and_keeps_its_direction():
    one, two, none = pull(0.01), pull(0.02), pull(0.0)
    np.testing.assert_allclose(two.ratio, 2 * one.ratio, rtol=1e-4)
    np.testing.assert_allclose(two.cosine, one.cosine, atol=1e-4)
    assert (none.ratio == 0).all() and np.isnan(none.cosine).all()
    assert len(one.ratio) == 2
    text = balance_runs.pull_text({"loss": [one], "bias": [none]}).splitlines()
    assert text[2].split()[:4] == ["bias", "7", "0.000", "0.000"]
    left, right = balance_runs.plot_pulls({"loss": [one], "bias": [none]}).axes
    assert len(left.lines) == 4 and len(right.lines) == 5
