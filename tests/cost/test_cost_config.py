"""Blocks cost and budget: what they refuse, and when a budget is used up."""

import math

import pytest

from moejax.config import ConfigError, build
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
