"""What an ablation found: ``analyse(folder)``, from its record alone, and its text."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.analysis import multipliers, statistics
from moejax.analysis.ablation_health import add_health
from moejax.analysis.ablation_record import (
    COSTS,
    Record,
    is_number,
    mean_of,
    metric_values,
    read_record,
)
from moejax.analysis.ablation_scaling import variant_fits
from moejax.analysis.ablation_text import format_analysis
from moejax.analysis.statistics import BETTER, WORSE, Comparison, compare, mean_interval

__all__ = ["AGREES", "DISAGREES", "OPEN", "analyse", "format_analysis", "within_run_curves"]

AGREES, DISAGREES, OPEN = "agrees in direction", "disagrees", "cannot tell"
_CHARGED = ("dollars", "device_hours")


def analyse(folder: str | pathlib.Path) -> dict[str, Any]:
    """Compares an ablation's variants at equal budgets; an unfinished grid is analysed as it is.

    Args:
      folder: the ``--workdir`` of `moejax ablate`.

    Returns:
      JSON-ready:
        name, metric, hold, reference, seeds, budgets, claim, device: as run
        missing: cells that have not ended: variant, seed, budget
        failed: cells that failed: id, variant, seed, budget, error
        variants: by name
          edits: fields and values over the base
          learning_rate: chosen; tried, [rate, mean metric or None where all runs failed] ...;
            at_edge, whether the chosen one is at the end of its bracket
          by_budget: a list, the points of the curves: budget; n; values by seed (as text); mean;
            sd; interval, a 95 % t interval of its own; tokens, flops, seconds, dollars, means over
            seeds of the whole path from step 0; failures
          difference: to the reference at one budget, the largest that can be compared; None of the
            reference itself. Fields of ``statistics.Difference``, and budget and text
          health: max_violation, max_violation_by_layer and dropped_share, means over seeds, the
            first two with ``_interval``, and ``_difference`` to the reference where both have them
        pooled: sd and df of the shared error variance, and who was left out of it, why
        multipliers: see ``multipliers.compare_ladders``
        scaling: by axis along which five or more variants differ, see
          ``ablation_scaling.variant_fits``
        claim_outcome, claim_text: whether the grid says what the claim says
        bill: planned; spent, and of it calibration, tuning and failed: dollars and device-hours;
          by_variant

    Raises:
      UserError: see ``read_record``.
    """
    record = read_record(folder)
    spec, names = record.spec, list(record.spec["variants"])
    reference, effect = spec["reference"], spec.get("smallest_effect") or None
    budget = _compared_budget(record)
    values = metric_values(record, budget)
    comparison = compare(values, reference, smallest_effect=effect)
    variants = {name: _variant(record, name, budget, comparison) for name in names}
    add_health(record, budget, variants)
    outcome, why = _claim(spec, values, comparison)
    return {
        "name": spec["name"],
        "metric": record.metric,
        "hold": spec["budget"]["hold"],
        "reference": reference,
        "seeds": list(spec["seeds"]),
        "budgets": record.amounts,
        "smallest_effect": effect,
        "alpha": comparison.alpha,
        "claim": spec.get("claim"),
        "device": record.device(),
        "missing": _missing(record),
        "failed": [_failure(row) | {"variant": row["variant"], "budget": row["budget"]}
                   for row in record.rows if row["status"] == "failed"],
        "variants": variants,
        "pooled": dataclasses.asdict(comparison.pool)
        | {"variants": list(comparison.pool.variants)},
        "multipliers": {
            name: multipliers.compare_ladders(_ladder(record, name), _ladder(record, reference),
                                              device=record.device())
            for name in names if name != reference
        },
        "scaling": variant_fits(record, budget),
        "claim_outcome": outcome,
        "claim_text": why,
        "bill": _bill(record),
    }  # fmt: skip


def within_run_curves(folder: str | pathlib.Path, field: str = "") -> dict[str, Any]:
    """The metric within every run: variant -> seed (as text) -> rows of the largest budget.

    Args:
      folder: the ``--workdir`` of `moejax ablate`; cells without ``metrics.jsonl`` are left out.
      field: of the metrics; the ablation's own by default.

    Returns:
      Lists of ``step``, ``value`` and ``tokens``, ``flops``, ``seconds``, ``dollars``: of training
      to that step, as so large a share of the cell's own as of its steps; None where it has none.

    Raises:
      UserError: see ``read_record``; damaged metrics.
    """
    from moejax.training.metrics import FILE, read_metrics  # which brings TensorBoard along

    record, curves = read_record(folder), {}
    field = field or record.metric
    for name in record.spec["variants"]:
        curves[name] = {}
        for row in record.measured(name, record.amounts[-1]):
            run = record.path / "runs" / row["id"]
            if not (run / FILE).is_file() or not row.get("steps"):
                continue
            each = {axis: row[source] / row["steps"] if is_number(row.get(source)) else None
                    for axis, source in COSTS.items()}  # fmt: skip
            curves[name][str(row["seed"])] = [
                {"step": line["step"], "value": line[field]}
                | {axis: cost and cost * line["step"] for axis, cost in each.items()}
                for line in read_metrics(run)
                if is_number(line.get(field))
            ]
    return curves


def _compared_budget(record: Record) -> float:
    """The largest budget at which some variant shares two seeds with the reference."""
    for budget in reversed(record.amounts):
        found = metric_values(record, budget)
        ours = found.pop(record.spec["reference"])
        if any(len(ours.keys() & theirs.keys()) > 1 for theirs in found.values()):
            return budget
    return record.amounts[-1]


def _variant(record: Record, name: str, budget: float, comparison: Comparison) -> dict[str, Any]:
    found = comparison.differences.get(name)
    return {
        "edits": record.spec["variants"][name],
        "learning_rate": _learning_rate(record, name),
        "by_budget": [_point(record, name, amount) for amount in record.amounts],
        "difference": found and {"budget": budget, **_difference(found)},
        "health": {},
    }


def _difference(found: statistics.Difference) -> dict[str, Any]:
    return dataclasses.asdict(found) | {
        "interval": found.interval and list(found.interval),
        "notes": list(found.notes),
        "text": statistics.verdict_text(found),
    }


def _point(record: Record, name: str, budget: float) -> dict[str, Any]:
    """A variant at a budget."""
    rows = record.completed(name, budget)
    values = {str(seed): row[record.metric] for seed, row in sorted(rows.items())}
    mean = sd = interval = None
    if values:
        mean, sd, interval = mean_interval(np.array(list(values.values())))
    costs = {axis: mean_of([row.get(field) for row in rows.values()])
             for axis, field in COSTS.items()}  # fmt: skip
    lost = [row for row in record.measured(name, budget) if row["seed"] not in rows]
    return {
        "budget": budget, "n": len(values), "values": values, "mean": mean, "sd": sd,
        "interval": interval and list(interval), **costs, "failures": [_failure(r) for r in lost],
    }  # fmt: skip


def _failure(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "seed": row["seed"], "error": row.get("error") or "no finite metric"}


def _learning_rate(record: Record, name: str) -> dict[str, Any]:
    """As the plan decided it, else from the tuning cells that ended."""
    decided = (record.plan.get("tuning") or {}).get(name)
    if decided:
        return dict(decided)
    tried: dict[float, list[float | None]] = {}
    chosen = None
    for row in record.rows:
        if row["variant"] != name:
            continue
        if row["kind"] != "tune":
            chosen = row.get("learning_rate") if chosen is None else chosen
            continue
        good = row["status"] == "completed" and is_number(row.get(record.metric))
        tried.setdefault(row["learning_rate"], []).append(row[record.metric] if good else None)
    # A rate that fails for some seed is no candidate; its mean would hide that.
    means = [[rate, mean_of(found)] for rate, found in sorted(tried.items())]
    ends = {means[0][0], means[-1][0]} if len(means) > 1 else set()
    return {"chosen": chosen, "tried": means, "at_edge": chosen in ends}


def _missing(record: Record) -> list[dict[str, Any]]:
    """Cells of the grid proper that have no result."""
    ended = {(row["variant"], row["seed"], row["budget"]) for row in record.rows
             if row["kind"] != "tune"}  # fmt: skip
    return [
        {"variant": name, "seed": seed, "budget": budget}
        for name in record.spec["variants"]
        for seed in record.spec["seeds"]
        for budget in record.amounts
        if (name, seed, budget) not in ended
    ]


def _ladder(record: Record, name: str) -> multipliers.Ladder:
    """A variant's losses and costs: of every budget, by seed."""
    points = {}
    for budget in record.amounts:
        points[budget] = {
            seed: multipliers.Point(
                row[record.metric],
                {axis: row[field] for axis, field in COSTS.items() if is_number(row.get(field))},
            )
            for seed, row in record.completed(name, budget).items()
        }
    return points


def _claim(
    spec: Mapping[str, Any], values: dict[str, dict[int, float]], comparison: Comparison
) -> tuple[str | None, str]:
    """Whether the grid says what the claim says, and why.

    A claimed variant that is not the reference has to beat the reference, and nobody may beat it;
    a claimed reference has to beat all others.
    """
    direction = (spec.get("claim") or {}).get("direction")
    if direction is None:
        return None, "no claim names a variant"
    reference, verdicts = spec["reference"], comparison.differences
    smallest = spec.get("smallest_effect") or 0.0
    if direction == reference:
        rivals = {name: found.verdict for name, found in verdicts.items()}
        means = {name: found.mean for name, found in verdicts.items()}
        undecided = [name for name, verdict in rivals.items() if verdict != WORSE]
    else:
        others = compare(values, direction, power=None).differences
        # The main table's verdict counts, so that table and outcome cannot contradict each other.
        rivals = {name: found.verdict for name, found in others.items() if name != reference}
        own = verdicts[direction].verdict
        rivals[reference] = {BETTER: WORSE, WORSE: BETTER}.get(own, own)
        means = {name: found.mean for name, found in others.items()}
        undecided = [reference] if rivals[reference] != WORSE else []

    def named(verdict: str) -> list[str]:
        """Those with a verdict, and of which the difference does not matter."""
        return [
            f"{name} (by less than the {smallest:g} of interest)" if abs(means[name]) < smallest
            else name for name, found in rivals.items() if found == verdict
        ]  # fmt: skip

    winners = named(BETTER)
    if winners:
        return DISAGREES, f"better than {direction}: {', '.join(winners)}"
    if undecided:
        return OPEN, f"{direction} cannot be told from {', '.join(undecided)}"
    return AGREES, f"{direction} better than {', '.join(named(WORSE))}"


def _bill(record: Record) -> dict[str, Any]:
    """What was planned and what was charged: the cells' ledgers, and timing steps beforehand."""
    kinds = {name: [r for r in record.rows if r["variant"] == name]
             for name in record.spec["variants"]}  # fmt: skip
    timed = [entry for entry in (record.plan.get("calibration") or {}).values()
             if "dollars" in entry]  # fmt: skip
    calibration = {name: sum((entry.get(name) or 0.0 for entry in timed), 0.0) for name in _CHARGED}
    cells = _charged(record.rows)
    return {
        "planned": record.plan.get("planned"),
        "spent": {name: cells[name] + calibration[name] for name in _CHARGED},
        "calibration": calibration,
        "tuning": _charged([row for row in record.rows if row["kind"] == "tune"]),
        "failed": _charged([row for row in record.rows if row["status"] == "failed"]),
        "by_variant": {name: _charged(rows) for name, rows in kinds.items()},
    }


def _charged(rows: Any) -> dict[str, float]:
    total = dict.fromkeys(_CHARGED, 0.0)
    for row in rows:
        hours = (row.get("device_seconds") or 0.0) / 3600
        charged = row.get("charged") or {"dollars": row.get("dollars"), "device_hours": hours}
        for name in _CHARGED:
            total[name] += charged.get(name) or 0.0
    return total
