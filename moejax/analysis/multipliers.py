"""Reaches the reference's loss with x times fewer FLOPs, tokens, seconds or dollars.

Loss over cost is fitted for either side by L(C) = E + A (C / C0)^-alpha, least squares on the means
over seeds, over a ladder of at least four budgets. The multiplier is C_reference / C_variant at the
lowest loss that both ladders reach: the larger of the two losses at the largest budgets. So the
worse side is read at the end of its ladder and the better one within, and nothing is extrapolated.
Above 1 the variant is the cheaper.

The budgets of one seed may share a trunk, so that their errors are not independent; seeds are. The
interval is a jackknife's over seeds, on the logarithm, the same seed left out on both sides, with
Student's t on the seeds less one.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

AXES = ("flops", "tokens", "seconds", "dollars")
LEAST_BUDGETS, LEAST_SEEDS = 4, 2
ALPHA = 0.05
WIDEST = 1000.0  # factor between the ends of an interval that still says something
_EXPONENTS = np.geomspace(0.01, 8, 160)

Curves = Literal["power_law", "monotone"]


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a ladder.

    Attributes:
      loss: the metric; lower is better.
      costs: of the whole run, by axis: 'flops', 'tokens', 'seconds', 'dollars'.
    """

    loss: float
    costs: Mapping[str, float]


Ladder = Mapping[float, Mapping[int, Point]]  # budget -> seed -> run


@dataclasses.dataclass(frozen=True)
class PowerCurve:
    """L(C) = floor + scale (C / unit)^-exponent.

    Attributes:
      floor: E, at least 0.
      scale: A, above 0.
      exponent: alpha.
      unit: C0, the geometric mean of the ladder's costs.
    """

    floor: float
    scale: float
    exponent: float
    unit: float

    def loss(self, cost: Any) -> Any:
        """Loss at a cost or an array of costs."""
        return self.floor + self.scale * (np.asarray(cost) / self.unit) ** -self.exponent

    def cost(self, loss: float) -> float:
        """Cost at which a loss is reached; infinite at the floor and below."""
        if loss <= self.floor:
            return math.inf
        return self.unit * ((loss - self.floor) / self.scale) ** (-1 / self.exponent)


@dataclasses.dataclass(frozen=True)
class MonotoneCurve:
    """Straight lines between the points, in the logarithms; losses are made to fall first.

    Attributes:
      costs: rising.
      losses: falling.
    """

    costs: tuple[float, ...]
    losses: tuple[float, ...]

    def loss(self, cost: Any) -> Any:
        """Loss at a cost or an array of costs, constant beyond the ends."""
        return np.exp(np.interp(np.log(cost), np.log(self.costs), np.log(self.losses)))

    def cost(self, loss: float) -> float:
        """Least cost at which a loss is reached; infinite below the lowest."""
        if loss < self.losses[-1]:
            return math.inf
        below, above = np.log(self.losses[::-1]), np.log(self.costs[::-1])
        return float(np.exp(np.interp(math.log(loss), below, above)))


def fit_power_curve(
    costs: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"]
) -> PowerCurve | None:
    """Least squares of a power law with a floor; None where the losses do not fall with the cost.

    For a given exponent floor and scale are linear, so that one bounded search over the exponent
    finds the optimum, without starting values. A floor below zero is put at zero.
    """
    unit = float(np.exp(np.log(costs).mean()))
    at = lambda exponents: _linear_part(costs / unit, losses, np.atleast_1d(exponents))
    best = int(np.argmin(at(_EXPONENTS)[0]))
    low, high = _EXPONENTS[max(best - 1, 0)], _EXPONENTS[min(best + 1, len(_EXPONENTS) - 1)]
    found = optimize.minimize_scalar(
        lambda log: at(math.exp(log))[0][0], bounds=(math.log(low), math.log(high)),
        method="bounded", options={"xatol": 1e-9},
    )  # fmt: skip
    exponents = np.array([math.exp(found.x), _EXPONENTS[best]])
    squares, floors, scales = at(exponents)
    i = int(np.argmin(squares))
    if scales[i] <= 0:
        return None
    return PowerCurve(float(floors[i]), float(scales[i]), float(exponents[i]), unit)


def _linear_part(
    costs: Float[np.ndarray, " n"],
    losses: Float[np.ndarray, " n"],
    exponents: Float[np.ndarray, " k"],
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """(sum of squares, floor, scale) at each exponent."""
    powers = costs ** -exponents[:, None]
    spread = powers - powers.mean(1, keepdims=True)
    scales = spread @ losses / (spread**2).sum(1)
    floors = losses.mean() - scales * powers.mean(1)
    through_zero = powers @ losses / (powers**2).sum(1)
    scales, floors = np.where(floors < 0, through_zero, scales), np.maximum(floors, 0.0)
    residuals = floors[:, None] + scales[:, None] * powers - losses[None, :]
    return (residuals**2).sum(1), floors, scales


def fit_monotone_curve(
    costs: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"]
) -> MonotoneCurve | None:
    """Interpolation of the falling losses closest to those given; None where they do not fall."""
    order = np.argsort(costs)
    falling = optimize.isotonic_regression(losses[order], increasing=False).x
    if falling[0] == falling[-1] or falling[-1] <= 0:
        return None
    return MonotoneCurve(tuple(costs[order].tolist()), tuple(falling.tolist()))


_FITS = {"power_law": fit_power_curve, "monotone": fit_monotone_curve}


def compare_ladders(
    ladder: Ladder,
    reference: Ladder,
    *,
    device: str | None,
    curve: Curves = "power_law",
    alpha: float = ALPHA,
) -> dict[str, dict[str, Any]]:
    """Multipliers of a variant against the reference, by axis.

    Args:
      ladder: the variant's runs by budget and seed; failed ones are left out.
      reference: the reference's.
      device: what the runs were measured on; dollars rank kernels and not methods on a CPU.
      curve: 'power_law', or 'monotone' interpolation for those who ask for it.
      alpha: error of the interval.

    Returns:
      For each of ``AXES``: ``value`` and ``interval``, None where ``why`` says why not; ``bound``:
      'above' where the variant is better already at its smallest budget, 'below' where the
      reference is, else None: of a bound ``value`` is None and ``interval`` open on one side;
      ``target_loss``; ``seeds``; ``budgets`` of the variant and the reference; ``fit_error``, the
      largest distance of a mean from its curve, in the loss's unit; ``curves`` of both.
    """
    return {
        axis: _multiplier(axis, ladder, reference, device, curve, alpha) for axis in AXES
    }  # fmt: skip


def is_cpu(device: str | None) -> bool:
    """Whether runs were measured on processors alone, or nobody knows on what."""
    return device is None or "cpu" in device.lower()


def _multiplier(
    axis: str, ladder: Ladder, reference: Ladder, device: str | None, curve: Curves, alpha: float
) -> dict[str, Any]:
    sides = [_finished(side) for side in (ladder, reference)]
    common = [set.intersection(*(set(runs) for runs in side.values())) for side in sides if side]
    seeds = sorted(set.intersection(*common)) if len(common) == 2 else []
    budgets = [len(side) for side in sides]
    result = {
        "value": None, "interval": None, "bound": None, "why": None, "target_loss": None,
        "seeds": len(seeds), "budgets": budgets, "fit_error": None, "curves": None,
    }  # fmt: skip
    if min(budgets) < LEAST_BUDGETS:
        return result | {"why": f"a ladder of {LEAST_BUDGETS} budgets is needed, and "
                         f"{min(budgets)} finished"}  # fmt: skip
    if len(seeds) < LEAST_SEEDS:
        return result | {"why": f"{LEAST_SEEDS} seeds that finished every budget on both sides "
                         f"are needed, and {len(seeds)} did"}  # fmt: skip
    if axis == "dollars" and is_cpu(device):
        where = f"on {device}" if device else "on an unknown device"
        return result | {
            "why": f"measured {where}: its dollars rank CPU kernels; measure on an accelerator"
        }
    if not all(axis in side[b][s].costs for side in sides for b in side for s in seeds):
        return result | {"why": f"a run has no record of its {axis}"}
    tables = [_table(side, seeds, axis) for side in sides]
    return result | _estimate(tables, curve, alpha)


def _finished(ladder: Ladder) -> dict[float, Mapping[int, Point]]:
    """Budgets with any finished run."""
    return {budget: runs for budget, runs in ladder.items() if runs}


Table = Float[np.ndarray, "2 budgets seeds"]  # costs and losses


def _table(ladder: Ladder, seeds: list[int], axis: str) -> Table:
    runs = [[ladder[budget][seed] for seed in seeds] for budget in sorted(ladder)]
    costs = [[run.costs[axis] for run in row] for row in runs]
    return np.array([costs, [[run.loss for run in row] for row in runs]], float)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Both sides fitted and read; ``log`` is the logarithm of the multiplier or of its bound."""

    log: float
    bound: str | None
    target: float
    curves: tuple[Any, Any]
    error: float


def _estimate(tables: list[Table], curve: Curves, alpha: float) -> dict[str, Any]:
    seeds = tables[0].shape[-1]
    whole = _read(tables, curve, None)
    if isinstance(whole, str):
        return {"why": whole}
    without = [_read([np.delete(t, i, axis=-1) for t in tables], curve, whole.bound or "none")
               for i in range(seeds)]  # fmt: skip
    result = {
        "target_loss": whole.target,
        "fit_error": whole.error,
        "curves": dict(zip(("variant", "reference"),
                           (dataclasses.asdict(c) for c in whole.curves), strict=True)),
    }  # fmt: skip
    if any(isinstance(found, str) for found in without):
        return result | {"why": "the fit hangs on a single seed; add seeds or budgets"}
    logs = np.array([found.log for found in without])
    error = math.sqrt((seeds - 1) / seeds * float(((logs - logs.mean()) ** 2).sum()))
    half = -float(special.stdtrit(seeds - 1, alpha / 2)) * error
    if 2 * half > math.log(WIDEST):
        return result | {"why": "the seeds are too far apart: the interval would span a factor of "
                         f"more than {WIDEST:,.0f}"}  # fmt: skip
    if whole.bound:  # one-sided
        limit = -float(special.stdtrit(seeds - 1, alpha)) * error
        end = math.exp(whole.log + (-limit if whole.bound == "above" else limit))
        better = "variant" if whole.bound == "above" else "reference"
        return result | {
            "bound": whole.bound,
            "interval": [end, None] if whole.bound == "above" else [None, end],
            "why": f"the {better} is better already at its smallest budget: a bound only",
        }
    return result | {
        "value": math.exp(whole.log),
        "interval": [math.exp(whole.log - half), math.exp(whole.log + half)],
    }


def _read(tables: list[Table], curve: Curves, bound: str | None) -> _Reading | str:
    """Fits both sides and reads off their costs at the common loss; else the reason why not.

    Args:
      tables: of the variant and the reference.
      curve: see ``compare_ladders``.
      bound: how the whole was read ('none', 'above', 'below'), so that a part is read alike; None
        for the whole itself.
    """
    means = [table.mean(-1) for table in tables]
    curves = [_FITS[curve](*mean) for mean in means]
    for name, found in zip(("variant", "reference"), curves, strict=True):
        if found is None:
            return f"the {name}'s loss does not fall with its budget"
    variant, reference = curves
    target = max(float(c.loss(mean[0, -1])) for c, mean in zip(curves, means, strict=True))
    costs = [c.cost(target) for c in curves]
    error = max(float(np.abs(c.loss(m[0]) - m[1]).max()) for c, m in zip(curves, means,
                                                                        strict=True))  # fmt: skip
    first = [float(mean[0, 0]) for mean in means]
    if bound is None:
        bound = "above" if costs[0] < first[0] else "below" if costs[1] < first[1] else "none"
    if bound == "above":
        costs[0] = first[0]
    if bound == "below":
        costs[1] = first[1]
    if not all(0 < cost < math.inf for cost in costs):
        return "the curves do not reach a common loss"
    log = math.log(costs[1] / costs[0])
    return _Reading(log, None if bound == "none" else bound, target, (variant, reference), error)
