"""Blocks cost and budget: what they refuse, and when a budget is used up."""

import math

import pytest

from moejax.config import ConfigError, UserError, build
from moejax.cost.cost_config import BudgetConfig, CostConfig


def test_defaults_charge_this_machine_without_limit():
    assert CostConfig().hardware == "auto"
    assert BudgetConfig().exceeded(1e9, 1e30, 1e6) is None


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("hardware", "h100", "did you mean 'h100_sxm'"),
        ("region", "usaa", "did you mean 'usa'"),
        ("price", -0.5, "must be a finite number of dollars"),
        ("price", math.nan, "must be a finite number"),
        ("price_kind", "sopt", "did you mean 'spot'"),
        ("pue", 0.9, "must be from 1"),
        ("pue", math.nan, "must be"),
        ("dollars_per_kwh", -0.1, "must be a number of dollars"),
        ("mfu", 0.0, "above 0 and at most 1"),
        ("mfu", 38.9, "above 0 and at most 1"),
        ("prise", 1.0, "no such field; did you mean 'price'"),
        ("final", "yes", "must be True or False"),
    ],
)
def test_bad_cost_fields(field, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(CostConfig, {field: value}, "cost")
    assert str(caught.value).startswith(f"cost.{field} = {value!r}: ")


def test_the_rate_of_a_run(tmp_path):
    assert CostConfig().rate("h800_sxm").dollars_per_hour == 2.0
    assert CostConfig(price=1.5).rate("h800_sxm").kind == "user"
    assert CostConfig(price_kind="spot").rate("h100_sxm").kind == "spot"
    path = tmp_path / "prices.yaml"
    path.write_text("cpu: {rates: {owned: {dollars_per_hour: 0.01, date: 2026, source: us}}}")
    cost = CostConfig(price_book=str(path))
    assert cost.rate("cpu").to_dict() == {
        "dollars_per_hour": 0.01, "kind": "owned", "source": "us", "date": "2026", "low": None,
        "high": None, "book": str(path),
    }  # fmt: skip
    assert cost.purchase("h800_sxm").book == "moejax"


def test_a_price_and_a_kind_contradict_each_other():
    with pytest.raises(ConfigError, match=r"cost\.price_kind = 'spot': has no use beside"):
        CostConfig(price=1.0, price_kind="spot")


def test_a_books_absence_is_found_when_it_is_needed():
    """Not before: the config of an old run can still be read once its book is gone."""
    cost = CostConfig(price_book="gone.yaml")
    with pytest.raises(UserError, match=r"gone\.yaml': cannot be read"):
        cost.rate("cpu")


@pytest.mark.parametrize("field", ["max_dollars", "max_flops", "max_hours"])
@pytest.mark.parametrize("value", [-1.0, 0, math.nan])
def test_a_budget_must_be_above_zero(field, value):
    with pytest.raises(ConfigError, match=rf"budget\.{field} = .*: must be"):
        build(BudgetConfig, {field: value}, "budget")


@pytest.mark.parametrize(
    "spent, named",
    [
        ((1.99, 9e11, 0.99), None),
        ((2.0, 0, 0), "budget.max_dollars = 2 reached (2 spent)"),
        ((0, 2e12, 0), "budget.max_flops = 1e+12 reached (2e+12 spent)"),
        ((0, 0, 1.5), "budget.max_hours = 1 reached (1.5 spent)"),
    ],
)
def test_the_limit_that_was_reached_is_named(spent, named):
    assert BudgetConfig(2.0, 1e12, 1.0).exceeded(*spent) == named
