"""Variants that are upcycled: the dense run comes first, and its variant pays for it."""

import json

import pytest
from ablations import TOKENS, ablate, results, write_ablation

from moejax.ablation import grid, run, spec
from moejax.config import ConfigError
from moejax.cost.bill import summarize
from moejax.training import run_dir

# Three shards of 8: one for the shared expert, two that are copied twice.
EDITS = {"moe": None, "model.d_ff": 24, "optim.decay_fraction": 0.0}
UPCYCLE = {"up": {"edits": EDITS, "share": 0.5}}
FLAGS = ("--config.variants={'scratch': {}, 'up': {}}", "--config.reference=scratch")


def flag(upcycle):
    return f"--config.upcycle={upcycle!r}"


def load(config, upcycle, *more):
    settings = [f.removeprefix("--config.") for f in (*FLAGS, flag(upcycle), *more)]
    return spec.load(str(config), settings)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_ablation(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ablation") / "whole"
    assert ablate(config, workdir, *FLAGS, flag(UPCYCLE)) == 0
    return workdir


@pytest.mark.slow
def test_the_dense_run_is_part_of_the_budget(whole):
    rows = results(whole)
    scratch, dense, up = (rows[n] for n in ("scratch-seed0", "up-seed0-dense", "up-seed0"))
    assert (scratch["steps"], dense["steps"], up["steps"]) == (6, 3, 3)
    assert dense["kind"] == "dense" and up["kind"] == "final"
    # Padding is not counted, and some rows have more of it.
    assert up["tokens"] == pytest.approx(scratch["tokens"], rel=0.01)
    assert dense["tokens"] == pytest.approx(TOKENS / 2, rel=0.01)
    assert up["model_flops"] == pytest.approx(
        dense["model_flops"] + scratch["model_flops"] / 2, rel=0.01
    )
    assert up["train_seconds"] > dense["train_seconds"] > 0
    # What the ablation has to pay: each run its own.
    assert up["charged"]["tokens"] == up["tokens"] - dense["tokens"]
    assert dense["charged"]["tokens"] == dense["tokens"]
    bill = summarize([whole / "runs"])["total"]["all_in"]
    assert bill["runs"] == 6
    assert bill["dollars"] == pytest.approx(sum(r["charged"]["dollars"] for r in rows.values()))


@pytest.mark.slow
def test_it_goes_on_from_its_own_dense_run(whole):
    record = json.loads((whole / "runs" / "up-seed1" / run_dir.CONFIG).read_text())
    assert record["from"]["upcycled"].endswith("up-seed1-dense")
    assert record["config"]["seed"] == 1 and record["config"]["moe"]["num_experts"] == 4
    assert record["config"]["train"]["steps"] == 3
    losses = {
        name: json.loads((whole / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("up-seed1", "up-seed1-dense")
    }
    assert {row["step"] for row in losses.values()} == {1}
    # The same rows, before the first update: by what the dense run has learned, and by nothing.
    assert losses["up-seed1"]["loss"] < losses["up-seed1-dense"]["loss"] - 0.05


@pytest.mark.slow
def test_the_analysis_compares_the_upcycled_run_and_charges_all(whole):
    found = json.loads((whole / "analysis.json").read_text())
    at = found["variants"]["up"]["by_budget"][0]
    assert at["n"] == 2 and not found["missing"]
    assert set(map(float, at["values"].values())) == {
        results(whole)[f"up-seed{seed}"]["val_bits_per_byte"] for seed in (0, 1)
    }
    rows = [r for n, r in results(whole).items() if n.startswith("up-")]
    charged = sum(row["charged"]["dollars"] for row in rows)
    assert found["bill"]["by_variant"]["up"]["dollars"] == pytest.approx(charged)


def test_steps_for_equal_flops(config):
    upcycle = {"up": {"edits": EDITS, "share": 0.25}}
    ablation = load(config, upcycle, "budget.hold=flops", "budget.amounts=[1000.0]")
    each = {"up": 2.0, "up:dense": 1.0, "scratch": 2.0}
    zeros = dict.fromkeys(("seconds", "seconds_low", "seconds_high"), 1.0)
    prices = dict.fromkeys(("price", "price_low", "price_high"), 1.0)
    rates = {
        name: grid.Rates(tokens=1.0, flops=flops, **zeros, **prices, devices=1, hardware="cpu",
                         measured=False, model={}, data="")
        for name, flops in each.items()
    }  # fmt: skip
    cells = {cell.id: cell for cell in grid.make_cells(ablation, rates)}
    dense, up = cells["up-seed0-dense"], cells["up-seed0"]
    assert (dense.steps, up.steps, cells["scratch-seed0"].steps) == (250, 375, 500)
    assert up.flops == 1000 and up.tokens == 625 and up.trunk == dense.id
    assert up.planned["device_hours"] == pytest.approx(375 / 3600)  # the dense cell has its own
    total = run.planned(list(cells.values()), rates)
    assert total["flops"] == 4 * 1000  # two variants, two seeds, each at the budget
    assert total["tokens"] == 2 * (500 + 625)
    assert total["by_kind"]["dense"]["flops"] == 2 * 250
    assert total["device_hours"] == pytest.approx(2 * (500 + 625) / 3600)


@pytest.mark.parametrize(
    ("upcycle", "more", "field"),
    [
        ({"upp": UPCYCLE["up"]}, (), "upcycle.upp"),
        ({"up": {"edits": {"model.d_ff": 24}, "share": 0.5}}, (), "upcycle.up.edits"),
        ({"up": {"edits": EDITS, "share": 1.0}}, (), "upcycle.share"),
        ({"up": {"edits": {**EDITS, "model.d_ff": 25}, "share": 0.5}}, (), "upcycle.up"),
        ({"up": {"edits": EDITS}}, (), "upcycle.up.share"),
        (UPCYCLE, ("budget.amounts=[1536.0, 3072.0]",), "budget.amounts"),
        (UPCYCLE, ("budget.hold=dollars",), "budget.hold"),
        (UPCYCLE, ("tuning={'factors': [1.0], 'seeds': [9]}",), "tuning"),
    ],
)
def test_what_cannot_be_is_refused(config, upcycle, more, field):
    with pytest.raises(ConfigError) as error:
        load(config, upcycle, *more)
    assert str(error.value).startswith(field)
