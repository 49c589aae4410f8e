"""Cells of the grid: equal budgets, ladders, the tuning's share; no device needed."""

import dataclasses

import pytest
from ablations import write_ablation
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.ablation import grid, spec, text
from moejax.ablation.grid import Cell, Rates
from moejax.config import ConfigError

RATES = Rates(
    tokens=100.0, flops=5000.0, seconds=0.5, seconds_low=0.25, seconds_high=1.0, devices=2,
    price=3.6, price_low=1.8, price_high=7.2, hardware="cpu", measured=True, model={}, data="x",
)  # fmt: skip
SLOW = dataclasses.replace(RATES, flops=10000.0, seconds=1.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_ablation(tmp_path_factory.mktemp("config"))


def cells_of(config, *settings: str, slow: Rates = RATES) -> list[Cell]:
    return grid.make_cells(spec.load(str(config), settings), {"bias": RATES, "aux": slow})


@pytest.mark.parametrize(
    ("hold", "amount", "steps"),
    [
        ("tokens", 10_000, {"bias": 100, "aux": 100}),
        ("flops", 500_000, {"bias": 100, "aux": 50}),
        # 0.5 s on two devices are one device-second; at 3.6 dollars an hour a tenth of a cent.
        ("device_seconds", 100, {"bias": 100, "aux": 50}),
        ("dollars", 0.1, {"bias": 100, "aux": 50}),
    ],
)
def test_steps_come_to_the_budget(config, hold, amount, steps):
    cells = cells_of(config, f"budget.hold={hold}", f"budget.amounts=[{amount}]", slow=SLOW)
    assert {cell.variant: cell.steps for cell in cells} == steps
    assert [cell.id for cell in cells] == ["bias-seed0", "aux-seed0", "bias-seed1", "aux-seed1"]
    assert {cell.kind for cell in cells} == {"final"}
    first = cells[0]
    assert (first.tokens, first.flops) == (10_000, 500_000)
    assert first.planned == pytest.approx(
        {"device_hours": 100 / 3600, "dollars": 0.1, "low": 0.025, "high": 0.4}
    )


@settings(deadline=None)
@given(amount=st.floats(1.0, 1e6), each=st.floats(0.5, 2e3))
def test_budgets_are_equal_to_one_per_cent_or_refused(amount, each):
    rates = dataclasses.replace(RATES, tokens=each)
    try:
        steps = grid.equal_steps("a", "budget.amounts[0]", amount, "tokens", rates)
    except ConfigError:
        nearest = max(1, round(amount / each))
        assert each > amount or abs(nearest * each / amount - 1) > 0.01
    else:
        assert steps >= 1 and abs(steps * each / amount - 1) <= 0.01


def test_a_ladder_is_a_trunk_and_branches_that_are_planned_once(config):
    """Decays of half the steps: branches of 10 and 20 steps leave the trunk of 40 at 5 and 10."""
    cells = cells_of(config, "budget.amounts=[1000,2000,4000]", "seeds=[3,4]")
    mine = [cell for cell in cells if cell.variant == "bias" and cell.seed == 3]
    assert [cell.kind for cell in mine] == ["trunk", "branch", "branch"]
    assert [cell.id for cell in mine] == ["bias-seed3-4000", "bias-seed3-1000", "bias-seed3-2000"]
    assert mine[0].at_steps == (5, 10)
    assert [(c.steps, c.from_step, c.trunk) for c in mine[1:]] == [
        (10, 5, "bias-seed3-4000"), (20, 10, "bias-seed3-4000"),
    ]  # fmt: skip
    assert mine[1].tokens == 1000  # of the whole path
    assert mine[1].planned["device_hours"] == pytest.approx(5 / 3600)  # of its own part
    found = spec.load(str(config), ["budget.amounts=[1000,2000,4000]", "seeds=[3,4]"])
    run = grid.cell_config(found, dataclasses.replace(mine[0], learning_rate=0.5))
    assert run.checkpoint.at_steps == (5, 10) and run.checkpoint.every_steps == 2
    assert (run.seed, run.train.steps, run.stage) == (3, 40, "ablation")
    assert run.optim.learning_rate == 0.5 and not run.cost.final


def test_tuning_is_shortened_to_its_share_with_room_for_one_more_factor(config):
    """Two runs of 100 steps may be tuned for 100 steps: three factors and one more, 25 each."""
    tuning = "tuning={'factors': [2.0, 0.5, 1.0], 'seeds': [7]}"
    cells = [c for c in cells_of(config, "budget.amounts=[10000]", tuning) if c.kind == "tune"]
    assert {cell.steps for cell in cells} == {25}
    assert [c.id for c in cells if c.variant == "aux"] == [
        "aux-tune-x0.5-seed7", "aux-tune-x1-seed7", "aux-tune-x2-seed7",
    ]  # fmt: skip
    assert [c.learning_rate for c in cells if c.variant == "aux"] == [0.005, 0.01, 0.02]
    final = [c for c in cells_of(config, "budget.amounts=[10000]", tuning) if c.kind == "final"]
    assert {cell.learning_rate for cell in final} == {None}  # not known yet


def test_tuning_is_no_longer_than_the_smallest_budget(config):
    settings = ("budget.amounts=[1000,9000]", "tuning={'factors': [0.5, 1.0], 'seeds': [7]}")
    assert {c.steps for c in cells_of(config, *settings) if c.kind == "tune"} == {10}


def test_a_tuning_that_ends_in_the_warm_up_is_refused(config):
    settings = ("budget.amounts=[200]", "tuning={'factors': [0.5, 1.0], 'seeds': [7, 8, 9]}")
    with pytest.raises(
        ConfigError, match=r"tuning.max_share = 0.5: leaves 0 steps .* warm-up of 2"
    ):
        cells_of(config, *settings)


def test_a_cell_survives_its_record(config):
    for cell in cells_of(config, "budget.amounts=[1000,2000]"):
        assert Cell.from_dict(cell.to_dict()) == cell


@pytest.mark.parametrize(("busy", "warned"), [(1.05, False), (1.2, True)])
def test_what_was_really_taken_of_a_budget_of_time_is_said(config, busy, warned):
    hold = ["budget.hold=device_seconds", "budget.amounts=[100]"]
    found = spec.load(str(config), hold)
    cells = grid.make_cells(found, {"bias": RATES, "aux": SLOW})
    seconds = {"bias": 100.0, "aux": 100.0 * busy}
    rows = {
        cell.id: {"status": "completed", "device_seconds": seconds[cell.variant]} for cell in cells
    }
    rows[cells[0].id] = {"status": "failed", "device_seconds": 1.0}  # does not count
    shares = text.taken(found, cells, rows)
    assert shares == pytest.approx({"bias": 1.0, "aux": busy})
    nothing = {"by_kind": {}, "cells": 0, "device_hours": 0.0, "dollars": 0.0}
    said = text.format_outcome({
        "planned": nothing, "spent": nothing, "name": "x", "status": "completed", "ended": 4,
        "cells": 4, "analysis": None, "taken": shares,
    })  # fmt: skip
    assert f"bias 1, aux {busy:.3g}" in said and ("not equal" in said) == warned
    assert text.taken(spec.load(str(config), []), cells, rows) == {}
