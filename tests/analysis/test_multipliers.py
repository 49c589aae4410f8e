"""Multipliers on made ladders: the true one is recovered, within its interval, or refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.analysis.multipliers import (
    Point,
    compare_ladders,
    fit_monotone_curve,
    fit_power_curve,
)

COSTS = (1.0, 2.0, 4.0, 8.0)


def ladder(law, *, seeds=3, costs=COSTS, random=None, sd=0.0, luck=None, dollars=1.0):
    random = random or np.random.default_rng(0)
    luck = np.zeros(seeds) if luck is None else luck
    return {
        cost: {
            seed: Point(
                law(cost) + float(luck[seed]) + sd * random.standard_normal(),
                {"flops": cost, "tokens": 10 * cost, "seconds": cost / 7,
                 "dollars": cost * dollars},
            )
            for seed in range(seeds)
        }
        for cost in costs
    }  # fmt: skip


def power(times=1.0, floor=1.2, scale=0.6, exponent=0.35):
    return lambda cost: floor + scale * (times * cost) ** -exponent


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 3.0), st.floats(0.05, 3.0), st.floats(0.05, 1.5), st.integers(4, 7))
def test_a_power_law_is_fitted_exactly(floor, scale, exponent, count):
    costs = np.geomspace(1e15, 3e17, count)
    losses = floor + scale * (costs / 1e16) ** -exponent
    found = fit_power_curve(costs, losses)
    np.testing.assert_allclose(found.loss(costs), losses, rtol=1e-6)
    for cost, loss in zip(costs, losses, strict=True):
        assert found.cost(loss) == pytest.approx(cost, rel=1e-3)


def test_what_does_not_fall_is_no_curve():
    costs = np.array(COSTS)
    assert fit_power_curve(costs, costs) is None
    assert fit_monotone_curve(costs, costs) is None
    flat = compare_ladders(ladder(lambda c: 1 + c), ladder(power()), device="h100_sxm")
    assert flat["flops"]["why"] == "the variant's loss does not fall with its budget"


@pytest.mark.parametrize("times", [0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("curve", ["power_law", "monotone"])
def test_without_noise_the_multiplier_is_exact(times, curve):
    found = compare_ladders(
        ladder(power(times), dollars=2.0), ladder(power()), device="h100_sxm", curve=curve
    )
    # Straight lines miss a curve between the points by a little.
    close = dict(rel=1e-4) if curve == "power_law" else dict(rel=0.15)
    for axis in ("flops", "tokens", "seconds"):
        assert found[axis]["value"] == pytest.approx(times, **close)
    # A dollar buys half as much of the variant.
    assert found["dollars"]["value"] == pytest.approx(times / 2, **close)
    worse = max(power(times)(8.0), power()(8.0))
    assert found["flops"]["target_loss"] == pytest.approx(worse, rel=1e-6)


def test_the_interval_holds_the_true_multiplier():
    """95 % intervals of 60 made pairs: fewer than 50 that hold it is a chance of 1 in 1,000."""
    random, held = np.random.default_rng(3), 0
    for _ in range(60):
        luck = 0.02 * random.standard_normal(5)
        sides = [ladder(power(x), seeds=5, random=random, sd=0.005, luck=luck) for x in (1.5, 1)]
        low, high = compare_ladders(*sides, device="h100_sxm")["flops"]["interval"]
        held += low <= 1.5 <= high
    assert held >= 50


def test_a_bound_where_the_ladders_have_no_loss_in_common():
    above = compare_ladders(ladder(power(50.0)), ladder(power()), device="h100_sxm")["flops"]
    assert above["value"] is None and above["bound"] == "above" and "bound only" in above["why"]
    assert above["interval"] == [pytest.approx(8.0, rel=1e-3), None]  # 8 at the end against 1
    below = compare_ladders(ladder(power()), ladder(power(50.0)), device="h100_sxm")["flops"]
    assert below["bound"] == "below" and below["interval"] == [None, pytest.approx(1 / 8, rel=1e-3)]


def test_refusals_say_why():
    good = ladder(power())
    three = compare_ladders(ladder(power(), costs=COSTS[:3]), good, device="h100_sxm")
    assert three["flops"]["why"] == "a ladder of 4 budgets is needed, and 3 finished"
    one = compare_ladders(ladder(power(), seeds=1), good, device="h100_sxm")
    assert "2 seeds" in one["tokens"]["why"] and one["tokens"]["value"] is None
    for device, words in (("cpu", "measured on cpu"), (None, "unknown device")):
        found = compare_ladders(ladder(power(2.0)), good, device=device)
        assert found["dollars"]["value"] is None and words in found["dollars"]["why"]
        assert found["flops"]["value"] == pytest.approx(2, rel=1e-4)
    unpriced = {c: {s: Point(p.loss, {"flops": c}) for s, p in runs.items()}
                for c, runs in good.items()}  # fmt: skip
    found = compare_ladders(unpriced, good, device="h100_sxm")
    assert found["seconds"]["why"] == "a run has no record of its seconds"


def test_an_interval_that_says_nothing_is_refused():
    # Seed 0 has the variant far cheaper, seed 1 far dearer; two seeds have t = 12.7.
    both = [ladder(power(times), seeds=1) for times in (3.0, 1 / 3)]
    apart = {cost: {0: both[0][cost][0], 1: both[1][cost][0]} for cost in COSTS}
    found = compare_ladders(apart, ladder(power(), seeds=2), device="h100_sxm")["flops"]
    assert found["value"] is None and found["interval"] is None
    assert "a factor of more than 1,000" in found["why"]


def test_a_seed_that_lacks_a_budget_is_left_out():
    random = np.random.default_rng(1)
    sides = [ladder(power(x), seeds=4, random=random, sd=0.002) for x in (1.5, 1.0)]
    del sides[0][4.0][2]
    found = compare_ladders(*sides, device="h100_sxm")["flops"]
    assert found["seeds"] == 3 and found["interval"][0] < 1.5 < found["interval"][1]


def test_the_budgets_costs_need_not_be_the_same():
    random = np.random.default_rng(2)
    ours = ladder(power(2.0), costs=(0.5, 1.5, 3.0, 5.0, 9.0), random=random)
    found = compare_ladders(ours, ladder(power()), device="h100_sxm")["flops"]
    assert found["budgets"] == [5, 4] and math.isclose(found["value"], 2.0, rel_tol=1e-3)
