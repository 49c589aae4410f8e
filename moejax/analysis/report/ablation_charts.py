"""Figures of an ablation: differences, results by budget, multipliers, balance, learning rates."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.analysis.report.charts import Chart, Forest, Interval, Line, LineChart
from moejax.analysis.report.gather import Ablation

# What a budget is counted in: in words, and as an axis.
UNITS = {
    "flops": ("FLOPs", "training FLOP"),
    "tokens": ("tokens", "training tokens"),
    "seconds": ("device time", "device-seconds"),
    "dollars": ("dollars", "US dollars"),
}
KINDS = {"better": "good", "worse": "bad", "cannot tell": "unsure"}


def differences(ablation: Ablation) -> list[Chart]:
    """Each variant's difference from the reference, and the multipliers beside it."""
    analysis = ablation.analysis
    rows = []
    for name, variant in analysis["variants"].items():
        found = variant.get("difference")
        if name == analysis["reference"] or not found or found.get("mean") is None:
            continue
        low, high = _ends(found.get("interval"))
        rows.append(Interval(name, found["mean"], low, high, KINDS.get(found["verdict"], "plain"),
                             found["verdict"]))  # fmt: skip
    charts: list[Chart] = []
    if rows:
        margin = analysis.get("smallest_effect") or 0.0
        unit = "bits per byte" if "bits" in analysis["metric"] else analysis["metric"]
        told = "Left of the line is better. Bars are 95 % intervals."
        if margin:
            told += " Shaded: too small to matter."
        charts.append(Forest("differences", f"Difference from {analysis['reference']}", told, rows,
                             unit, margin=margin))  # fmt: skip
    return charts + _multipliers(analysis)


def _ends(interval: Any) -> tuple[float, float]:
    low, high = interval or (None, None)
    return (-math.inf if low is None else low, math.inf if high is None else high)


def _multipliers(analysis: Mapping[str, Any]) -> list[Chart]:
    charts: list[Chart] = []
    for unit, (shown, _) in UNITS.items():
        rows = []
        for name, by_unit in (analysis.get("multipliers") or {}).items():
            found = by_unit.get(unit)
            if isinstance(found, Mapping) and found.get("value") is not None:
                low, high = _ends(found.get("interval"))
                kind = "good" if low > 1 else "bad" if high < 1 else "unsure"
                rows.append(Interval(name, found["value"], low, high, kind,
                                     f"{found['value']:.2f} x"))  # fmt: skip
        if rows:
            charts.append(Forest(
                f"multipliers-{unit}", f"Multiplier in {shown}",
                f"Reaches {analysis['reference']}'s loss with so many times less; right of "
                "the line is better.", rows, "times", zero=1.0, log=True,
            ))  # fmt: skip
    return charts


def by_budget(ablation: Ablation) -> list[Chart]:
    """The metric over tokens, FLOPs, seconds and dollars, where there are several budgets."""
    analysis = ablation.analysis
    charts: list[Chart] = []
    if len(analysis["budgets"]) < 2:
        return charts
    told = "Mean over seeds; the band is its 95 % interval."
    unit = analysis["metric"].removeprefix("val_").replace("_", " ")
    for field, (short, label) in UNITS.items():
        lines = []
        for number, (name, variant) in enumerate(analysis["variants"].items()):
            entries = [e for e in variant.get("by_budget", ())
                       if e.get("mean") is not None and e.get(field)]  # fmt: skip
            if len(entries) < 2:
                continue
            ends = [e.get("interval") or (e["mean"], e["mean"]) for e in entries]
            lines.append(Line(
                name, np.array([e[field] for e in entries], float),
                np.array([e["mean"] for e in entries], float),
                tuple(np.array(edge, float) for edge in zip(*ends, strict=True)), number, "points",
            ))  # fmt: skip
        if lines:
            charts.append(LineChart(f"budget-{field}", f"Loss over {short}",
                                    "" if charts else told, label, unit, lines, log_x=True,
                                    money=field == "dollars"))  # fmt: skip
    return charts


def balance(ablation: Ablation) -> list[Chart]:
    """MaxVio by layer at the end, a curve a variant."""
    lines = []
    for number, (name, variant) in enumerate(ablation.analysis["variants"].items()):
        layers = (variant.get("health") or {}).get("max_violation_by_layer")
        if layers:
            lines.append(Line(name, np.arange(len(layers), dtype=float),
                              np.array(layers, float), None, number, "points"))  # fmt: skip
    if not lines:
        return []
    return [LineChart("variants-max-violation", "MaxVio by layer", "Mean over seeds, at the end; "
                      "0 is perfect balance.", "layer with experts, from 0", "MaxVio", lines,
                      zero=True, whole=True)]  # fmt: skip


def learning_rates(ablation: Ablation) -> list[Chart]:
    """The metric over the learning rates that were tried, a curve a variant."""
    lines = []
    for number, (name, variant) in enumerate(ablation.analysis["variants"].items()):
        tried = (variant.get("learning_rate") or {}).get("tried") or []
        tried = sorted((lr, value) for lr, value in tried if value is not None)
        if len(tried) > 1:
            x, y = np.array(tried, float).T
            lines.append(Line(name, x, y, None, number, "points"))
    if not lines:
        return []
    unit = ablation.analysis["metric"].removeprefix("val_").replace("_", " ")
    told = "Seeds of their own, so that tuning does not choose the seeds that are compared."
    return [LineChart("learning-rates", "Learning rates tried", told, "learning rate", unit, lines,
                      log_x=True)]  # fmt: skip
