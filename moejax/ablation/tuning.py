"""Which learning rate a variant gets: the best of its bracket, which may grow once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.ablation import grid
from moejax.ablation.grid import Cell, Rates
from moejax.ablation.spec import AblationSpec


def decide(
    spec: AblationSpec,
    variant: str,
    rates: Rates,
    cells: Sequence[Cell],
    results: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], list[Cell]]:
    """The outcome of a variant's tuning, or the runs that it still needs.

    The best mean metric over the tuning seeds wins; a factor of which a run failed has no mean. If
    the best lies at the edge of the bracket, the bracket grows there by one factor, once, where
    ``tuning.max_share`` still allows that; if it then lies at the edge, that is said.

    Args:
      spec: the ablation.
      variant: whose tuning ended.
      rates: the variant's.
      cells: all of the ablation.
      results: lines of ``results.jsonl`` by cell; the variant's tuning runs have all ended.

    Returns:
      ``chosen`` (learning rate; None where no factor was trained to its end), ``tried`` (pairs of
      learning rate and mean metric, None of one that failed), ``at_edge`` and ``extended``; and
      the cells to add first, empty once it is decided.
    """
    tuning = [cell for cell in cells if cell.kind == "tune" and cell.variant == variant]
    factors = sorted({cell.factor for cell in tuning})
    means = {}
    for factor in factors:
        rows = [results[cell.id] for cell in tuning if cell.factor == factor]
        values = [row[spec.metric] for row in rows]
        good = all(row["status"] == "completed" for row in rows) and None not in values
        means[factor] = float(np.mean(values)) if good else math.nan
    trained = [factor for factor in factors if math.isfinite(means[factor])]
    own = grid.own_learning_rate(spec, variant)
    extended = len(factors) > len(spec.tuning.factors)
    found = {
        "chosen": None,
        "tried": [[factor * own, means[factor] if factor in trained else None]
                  for factor in factors],
        "at_edge": False,
        "extended": extended,
    }  # fmt: skip
    if not trained:
        return found, []
    best = min(trained, key=means.get)
    at_edge = len(factors) > 1 and best in (factors[0], factors[-1])
    if at_edge and not extended:
        more = _extension(spec, variant, rates, cells, tuning, factors, best)
        if more:
            return found, more
    return {**found, "chosen": best * own, "at_edge": at_edge}, []


def _extension(
    spec: AblationSpec,
    variant: str,
    rates: Rates,
    cells: Sequence[Cell],
    tuning: Sequence[Cell],
    factors: Sequence[float],
    best: float,
) -> list[Cell]:
    """One more factor beyond the edge, by the ratio of the two there; none if it costs too much."""
    inner = factors[1] if best == factors[0] else factors[-2]
    steps, seeds = tuning[0].steps, spec.tuning.seeds
    finals = [cell for cell in cells if cell.kind != "tune" and cell.variant == variant]
    spent = sum(cell.steps for cell in tuning) + steps * len(seeds)
    if spent > grid.tuning_allowance(spec, finals) * (1 + grid.TOLERANCE):
        return []
    factor = best * best / inner
    return [grid.tuning_cell(spec, variant, rates, factor, seed, steps) for seed in seeds]
