"""What an ablation found: ``analyse(folder)``, from its record alone, and its text."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.analysis import multipliers, statistics
from moejax.analysis.ablation_record import COSTS, Record, is_number, read_record
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
        claim_outcome, claim_text: whether the grid says what the claim says
        bill: planned; spent, tuning, failed: dollars and device-hours; by_variant

    Raises:
      UserError: see ``read_record``.
    """
    record = read_record(folder)
    spec, names = record.spec, list(record.spec["variants"])
    reference, effect = spec["reference"], spec.get("smallest_effect") or None
    budget = _compared_budget(record)
    values = _values(record, budget)
    comparison = compare(values, reference, smallest_effect=effect)
    variants = {name: _variant(record, name, budget, comparison) for name in names}
    _add_health(record, budget, variants)
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
      Lists of ``step``, ``tokens``, ``flops``, ``seconds``, ``dollars`` (None where the metrics do
      not say) and ``value``.

    Raises:
      UserError: see ``read_record``; damaged metrics.
    """
    from moejax.training.metrics import FILE, read_metrics  # which brings TensorBoard along

    record, curves = read_record(folder), {}
    field = field or record.metric
    sources = {"tokens": "tokens", "flops": "model_flops", "seconds": "seconds",
               "dollars": "dollars"}  # fmt: skip
    for name in record.spec["variants"]:
        curves[name] = {}
        for row in record.measured(name, record.amounts[-1]):
            run = record.path / "runs" / row["id"]
            if not (run / FILE).is_file():
                continue
            curves[name][str(row["seed"])] = [
                {"step": line["step"], "value": line[field]}
                | {axis: line.get(source) for axis, source in sources.items()}
                for line in read_metrics(run)
                if is_number(line.get(field))
            ]
    return curves


def _values(record: Record, budget: float, field: str = "") -> dict[str, dict[int, float]]:
    """Metric by seed, by variant."""
    field = field or record.metric
    return {
        name: {seed: row[field] for seed, row in record.completed(name, budget, field).items()}
        for name in record.spec["variants"]
    }


def _compared_budget(record: Record) -> float:
    """The largest budget at which some variant shares two seeds with the reference."""
    for budget in reversed(record.amounts):
        found = _values(record, budget)
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
    costs = {axis: _mean([row.get(field) for row in rows.values()])
             for axis, field in COSTS.items()}  # fmt: skip
    lost = [row for row in record.measured(name, budget) if row["seed"] not in rows]
    return {
        "budget": budget, "n": len(values), "values": values, "mean": mean, "sd": sd,
        "interval": interval and list(interval), **costs, "failures": [_failure(r) for r in lost],
    }  # fmt: skip


def _failure(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "seed": row["seed"], "error": row.get("error") or "no finite metric"}


def _mean(values: list[Any]) -> float | None:
    """Mean of numbers; None where one is missing, so that no sum hides a gap."""
    return float(np.mean(values)) if values and all(map(is_number, values)) else None


def _learning_rate(record: Record, name: str) -> dict[str, Any]:
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
    means = [[rate, _mean(found)] for rate, found in sorted(tried.items())]
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


def _add_health(record: Record, budget: float, variants: dict[str, Any]) -> None:
    """Router health at the compared budget, with intervals, and differences to the reference."""
    reference = record.spec["reference"]
    for name, entry in variants.items():
        rows = record.completed(name, budget).values()
        health = entry["health"]
        health["dropped_share"] = _mean([row.get("dropped_share") for row in rows])
        vio = [row["max_violation"] for row in rows if is_number(row.get("max_violation"))]
        layers = [row["max_violation_by_layer"] for row in rows
                  if row.get("max_violation_by_layer")]  # fmt: skip
        mean, _, interval = mean_interval(np.array(vio)) if vio else (None, None, None)
        health["max_violation"] = mean
        health["max_violation_interval"] = interval and list(interval)
        found = [mean_interval(layer) for layer in np.array(layers).T] if layers else None
        health["max_violation_by_layer"] = found and [mean for mean, *_ in found]
        health["max_violation_by_layer_interval"] = found and [
            interval and list(interval) for *_, interval in found
        ]
    values = _values(record, budget, "max_violation")
    _health_differences(values, reference, variants, "max_violation_difference")
    by_layer = {
        name: {
            seed: row["max_violation_by_layer"]
            for seed, row in record.completed(name, budget).items()
            if row.get("max_violation_by_layer")
        }
        for name in record.spec["variants"]
    }
    _layer_differences(by_layer, reference, variants)


def _health_differences(
    values: dict[str, dict[int, float]], reference: str, variants: dict[str, Any], key: str,
    alpha: float = statistics.ALPHA,
) -> None:  # fmt: skip
    """Differences of a measure of its own family, where the reference and another have it."""
    values = {name: found for name, found in values.items() if found}
    if reference not in values or len(values) < 2:
        return
    for name, found in compare(values, reference, alpha=alpha).differences.items():
        entry = {name: value for name, value in _difference(found).items()
                 if name in ("mean", "interval", "p", "p_holm", "verdict")}  # fmt: skip
        variants[name]["health"][key] = entry


def _layer_differences(
    by_layer: dict[str, dict[int, list[float]]], reference: str, variants: dict[str, Any]
) -> None:
    """MaxVio by layer: Holm over the variants, Bonferroni over the layers.

    Only variants with as many layers of experts as the reference.
    """
    depth = {len(layers) for layers in by_layer[reference].values()}
    if len(depth) != 1:
        return
    depth = depth.pop()
    key, found = "max_violation_by_layer_difference", []
    same = {name: seeds for name, seeds in by_layer.items()
            if seeds and all(len(layers) == depth for layers in seeds.values())}  # fmt: skip
    for layer in range(depth):
        values = {name: {seed: layers[layer] for seed, layers in seeds.items()}
                  for name, seeds in same.items()}  # fmt: skip
        boxes = {name: {"health": {}} for name in same}
        _health_differences(values, reference, boxes, key, statistics.ALPHA / depth)
        found.append(boxes)
    for name in same:
        if name != reference:
            variants[name]["health"][key] = [boxes[name]["health"].get(key) for boxes in found]


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
    if direction == reference:
        rivals = {name: found.verdict for name, found in verdicts.items()}
        undecided = [name for name, verdict in rivals.items() if verdict != WORSE]
    else:
        others = compare(values, direction).differences
        # The main table's verdict counts, so that table and outcome cannot contradict each other.
        rivals = {name: found.verdict for name, found in others.items() if name != reference}
        own = verdicts[direction].verdict
        rivals[reference] = {BETTER: WORSE, WORSE: BETTER}.get(own, own)
        undecided = [reference] if rivals[reference] != WORSE else []
    winners = [name for name, verdict in rivals.items() if verdict == BETTER]
    if winners:
        return DISAGREES, f"{', '.join(winners)} better than {direction}"
    if undecided:
        return OPEN, f"{direction} cannot be told from {', '.join(undecided)}"
    beaten = [name for name, verdict in rivals.items() if verdict == WORSE]
    return AGREES, f"{direction} better than {', '.join(beaten)}"


def _bill(record: Record) -> dict[str, Any]:
    """What was planned and what the cells' ledgers were charged, of it tuning and failures."""
    kinds = {name: [r for r in record.rows if r["variant"] == name]
             for name in record.spec["variants"]}  # fmt: skip
    return {
        "planned": record.plan.get("planned"),
        "spent": _charged(record.rows),
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
