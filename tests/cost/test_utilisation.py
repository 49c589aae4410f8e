"""The utilisation that a plan assumes: measured, published or default, and its range."""

import dataclasses
import json

import pytest

from moejax.config import ConfigError, UserError
from moejax.cost import utilisation
from moejax.cost.utilisation import PUBLISHED, Utilisation, assumed, given, measured
from moejax.models.presets import PRESETS

V3 = PRESETS["deepseek_v3"]


def test_published_by_chip_and_class():
    moe, dense = (
        assumed("h100_sxm", PRESETS["olmoe_1b_7b"]),
        assumed("h100_sxm", PRESETS["llama3_1_8b"]),
    )
    assert moe.mfu == 0.39 and "Qwen2-57B-A14B, arXiv 2504.14960" in moe.source
    assert (moe.low, moe.high) == (0.185, 0.493)
    assert dense.mfu == 0.41 and "Llama-3.1-405B on 16,384" in dense.source
    assert (dense.low, dense.high) == (0.346, 0.43)
    assert "with experts on h100_sxm" in moe.range_source


def test_v3s_is_converted_to_flops_that_count_its_module_ahead():
    """38.94 % by 250.45 GFLOP a token is the speed of 40.52 % by 260.64."""
    assert assumed("h800_sxm", V3).mfu == pytest.approx(0.3894 * 260.64 / 250.45, rel=1e-4)
    alone = dataclasses.replace(V3, mtp_depth=0)
    assert assumed("h800_sxm", alone).mfu == 0.3894


def test_a_chip_without_published_figures_has_a_default_within_its_class():
    found = assumed("b200", V3)
    assert (found.mfu, found.source) == (0.35, "default")
    assert found.low == 0.185 and found.high == 0.493 and "other chips" in found.range_source
    assert assumed("tpu_v5e", PRESETS["llama3_1_8b"]).low == 0.302
    cpu = assumed("cpu", V3)
    assert (cpu.mfu, cpu.low, cpu.high) == (0.15, 0.12, 0.22)


def test_a_chip_with_a_single_figure_has_the_range_of_its_class():
    found = assumed("tpu_v4", PRESETS["llama3_1_8b"])
    assert found.mfu == 0.462 and "PaLM" in found.source
    assert (found.low, found.high) == (0.302, 0.462) and "several chips" in found.range_source


def test_every_published_figure_has_a_run_and_a_source():
    for published in PUBLISHED:
        assert 0 < published.mfu < 1 and published.run and published.source
        assert str(published).endswith("derived") == published.derived


def run(folder, name, mfu=0.4, hardware="h100_sxm", steps=()):
    """A run's folder, as far as its utilisation goes."""
    path = folder / name
    path.mkdir()
    (path / "summary.json").write_text(json.dumps({"mfu": mfu, "status": "completed"}))
    opened = {"event": "open", "version": 1, "segment": "a", "hardware": hardware}
    (path / "ledger.jsonl").write_text(json.dumps(opened) + "\n")
    if steps:
        lines = [json.dumps({"step": i, "mfu": value}) for i, value in enumerate(steps)]
        (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "mf')
    return path


def test_measured_in_a_run(tmp_path):
    path = run(tmp_path, "one", steps=[0.01, *[0.38] * 5, *[0.42] * 5, 0.99])
    found = measured([path], "h100_sxm")
    assert found.mfu == 0.4 and str(path) in found.source
    assert (found.low, found.high) == (0.38, 0.42)  # less the tenth at each end
    bare = measured([run(tmp_path, "bare")], "h100_sxm")
    assert bare.low == bare.mfu == bare.high == 0.4


def test_measured_in_several_runs(tmp_path):
    paths = [run(tmp_path, name, mfu) for name, mfu in (("a", 0.3), ("b", 0.4), ("c", 0.5))]
    found = measured(paths, "h100_sxm")
    assert found.mfu == pytest.approx(0.4) and (found.low, found.high) == (0.3, 0.5)
    same = measured([run(tmp_path, name, 0.1) for name in "xyz"], "h100_sxm")
    assert same.low <= same.mfu <= same.high
    assert found.range_source == "3 runs"


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(ConfigError, match=r"has no summary\.json"):
        measured([tmp_path], "h100_sxm")
    with pytest.raises(ConfigError, match=r"has no utilisation in its summary\.json"):
        measured([run(tmp_path, "idle", mfu=None)], "h100_sxm")
    with pytest.raises(ConfigError, match="ran on h100_sxm, not on h800_sxm"):
        measured([run(tmp_path, "other")], "h800_sxm")
    torn = run(tmp_path, "torn")
    (torn / "summary.json").write_text('{"mfu": 0.')
    with pytest.raises(ConfigError, match="is not JSON"):
        measured([torn], "h100_sxm")
    odd = run(tmp_path, "odd")
    (odd / "ledger.jsonl").write_text('{"event": "open", "version": 1, "segment": "a"}\n')
    with pytest.raises(UserError, match="not a moejax ledger"):
        measured([odd], "h100_sxm")


@pytest.mark.parametrize("mfu", [0.0, -0.1, 1.5, float("nan")])
def test_no_such_utilisation(mfu):
    with pytest.raises(ConfigError, match=r"cost\.mfu"):
        given(mfu, "--mfu")
    with pytest.raises(ConfigError, match=r"cost\.mfu"):
        Utilisation(0.4, "a test", mfu, 0.5, "a test")


def test_given_is_a_point():
    found = given(0.4, "--mfu")
    assert found.low == found.mfu == found.high and found.source == "--mfu"
    assert utilisation.DEFAULT == 0.35
