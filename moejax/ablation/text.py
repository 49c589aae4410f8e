"""What an ablation says: the plan and its bill before, a line a cell, and the bill after."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.ablation.grid import Cell, Rates
from moejax.ablation.spec import AblationSpec
from moejax.analysis.ablation import format_analysis
from moejax.analysis.ablation_record import UNITS
from moejax.cost import text

UNSTEADY = 1.5  # longest over shortest step that one measurement may show
UNEQUAL = 1.1  # most over least that variants may take of an equal budget of time
LINES = {
    "tune": "tuning", "final": "runs", "trunk": "trunks", "branch": "decay branches",
    "dense": "dense runs to upcycle", "calibration": "measuring a step", "failed": "failed",
}  # fmt: skip


def format_plan(
    spec: AblationSpec, cells: Sequence[Cell], rates: Mapping[str, Rates], planned: Mapping
) -> str:
    """The whole grid and its bill, before it starts."""
    unit = UNITS[spec.budget.hold]
    amounts = ", ".join(text.si(amount) for amount in spec.budget.amounts)
    any_rates = rates[spec.reference]
    lines = [
        f"ablation {spec.name}: {len(spec.variants)} variants x {len(spec.seeds)} seeds at equal "
        f"{unit} ({amounts}), against {spec.reference}",
        text.columns(_variants(spec, cells, rates), left=1),
        *_tuning(spec, cells),
        text.columns(_bill(planned), left=1),
        f"on {any_rates.devices} x {any_rates.hardware} at ${any_rates.price:.4g} per device-hour; "
        + ("steps as measured" if any_rates.measured else "utilisation assumed")
        + "; start-up, compilation, evaluation and checkpoints come on top",
    ]
    return "\n".join(line for line in lines if line)


def _variants(
    spec: AblationSpec, cells: Sequence[Cell], rates: Mapping[str, Rates]
) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("variant", "parameters", "active", "FLOP/token", "tokens/step", "s/step", "steps")
    ]
    for name, rate in rates.items():
        first = [c for c in cells if c.seed == spec.seeds[0] and c.rates_name == name]
        steps = sorted({cell.steps for cell in first if cell.kind != "tune"})
        rows.append((
            name, text.parameters(rate.model["total"]), text.parameters(rate.model["active"]),
            text.si(rate.model["flops_per_token"]), f"{rate.tokens:,.0f}",
            f"{rate.seconds:.3g}{'' if rate.measured else ' (plan)'}",
            " ".join(map(str, steps)),
        ))  # fmt: skip
    return rows


def _tuning(spec: AblationSpec, cells: Sequence[Cell]) -> list[str]:
    if spec.tuning is None:
        return ["learning rates as configured, none tuned"]
    steps = sorted({cell.steps for cell in cells if cell.kind == "tune"})
    length = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    factors = ", ".join(f"{factor:g}" for factor in sorted(spec.tuning.factors))
    return [
        f"learning rate of each variant from {factors} x its own, {len(spec.tuning.seeds)} "
        f"seed(s) of their own, {length} steps each, at most "
        f"{text.percent(spec.tuning.max_share)} of what its runs take; a best at the edge may add "
        "one factor, not in the plan below"
    ]


def _bill(planned: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("planned", "cells", "tokens", "FLOP", "device-h", "dollars", "range")
    ]
    for name, part in [*planned["by_kind"].items(), ("all", planned)]:
        rows.append((
            LINES.get(name, name), str(part["cells"]), text.si(part["tokens"]),
            text.si(part["flops"]), f"{part['device_hours']:.3g}", text.dollars(part["dollars"]),
            f"{text.dollars(part['low'])} to {text.dollars(part['high'])}",
        ))  # fmt: skip
    return rows


def format_calibration(variant: str, found: Mapping[str, Any]) -> str:
    """A variant's measured step, with a warning where the machine was too busy to tell."""
    each, low, high = (1e3 * found[name] for name in ("seconds_per_step", "low", "high"))
    line = f"{variant}: {each:.4g} ms a step, measured ({low:.4g} to {high:.4g})"
    if high > UNSTEADY * low:
        line += (
            "\nwarning: the machine was busy with something else, and budgets of time will be as "
            "unequal; measure in a new --workdir when it is quiet"
        )
    return line


def format_row(
    row: Mapping[str, Any], cells: Sequence[Cell], rows: Mapping[str, Mapping], metric: str
) -> str:
    """One ended cell, and how far the grid is."""
    charged = sum(r["charged"]["dollars"] for r in rows.values())
    head = f"[{len(rows)}/{len(cells)}] {row['id']}"
    if row["status"] == "failed":
        return f"{head}: FAILED: {row['error']}"
    left = _seconds_left(cells, rows)
    return (
        f"{head}: {metric} {row[metric]:.4f}, {row['steps']} steps in "
        f"{text.duration(row['charged']['wall_seconds'])}; {text.dollars(charged)} so far, "
        f"{text.duration(left)} of cells left"
    )


def _seconds_left(cells: Sequence[Cell], rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Seconds that the cells left will take one after another, by those that ended."""
    done = [c for c in cells if c.id in rows and rows[c.id]["status"] == "completed"]
    hours = sum(cell.planned["device_hours"] for cell in done)
    if not hours:
        return None
    wall = sum(rows[cell.id]["charged"]["wall_seconds"] for cell in done)
    left = sum(cell.planned["device_hours"] for cell in cells if cell.id not in rows)
    return wall / hours * left


def spent(
    cells: Sequence[Cell], rows: Mapping[str, Mapping[str, Any]], calibration: Mapping[str, Any]
) -> dict[str, Any]:
    """What ended cells were charged: ``tokens``, ``model_flops``, ``device_hours``, ``dollars`` in
    all and ``by_kind``, where ``failed`` and ``calibration`` are kinds of their own."""
    names = ("tokens", "model_flops", "device_hours", "dollars")
    by_kind: dict[str, dict[str, float]] = {}
    entries = [
        ("failed" if rows[cell.id]["status"] == "failed" else cell.kind, rows[cell.id]["charged"])
        for cell in cells if cell.id in rows
    ]  # fmt: skip
    entries += [("calibration", {**dict.fromkeys(names, 0), **entry})
                for entry in calibration.values() if "dollars" in entry]  # fmt: skip
    for kind, charged in entries:
        part = by_kind.setdefault(kind, {"cells": 0, **dict.fromkeys(names, 0.0)})
        part["cells"] += 1
        for name in names:
            part[name] += charged[name]
    total = {name: sum(part[name] for part in by_kind.values()) for name in ("cells", *names)}
    return {**total, "by_kind": by_kind}


def taken(
    spec: AblationSpec, cells: Sequence[Cell], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """What a variant's completed runs really took of a budget of time or dollars, the mean.

    Their steps are those that were measured beforehand; beside other cells, or other programs, they
    may take longer. Empty where steps do not follow from time.
    """
    if not spec.budget.by_time:
        return {}
    shares: dict[str, list[float]] = {}
    for cell in cells:
        row = rows.get(cell.id)
        if row is not None and row["status"] == "completed" and cell.kind != "tune":
            shares.setdefault(cell.variant, []).append(row[spec.budget.hold] / cell.budget)
    return {name: statistics.fmean(shares[name]) for name in spec.variants if name in shares}


def _taken(outcome: Mapping[str, Any]) -> list[str]:
    shares = outcome["taken"]
    if not shares:
        return []
    each = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
    lines = [f"taken of the budget, 1 as planned: {each}"]
    if max(shares.values()) > UNEQUAL * min(shares.values()):
        lines.append(
            "warning: budgets of time were not equal, since steps took longer than measured; run "
            "with fewer --processes, or when the machine is quiet"
        )
    return lines


def format_outcome(outcome: Mapping[str, Any]) -> str:
    """The bill after, against the plan; then the verdicts and a line for every failure."""
    planned, found = outcome["planned"], outcome["spent"]
    rows: list[Sequence[str]] = [
        ("the bill", "planned", "spent", "device-h planned", "device-h", "dollars planned",
         "dollars")
    ]  # fmt: skip
    kinds = [kind for kind in LINES if kind in planned["by_kind"] or kind in found["by_kind"]]
    nothing = {"cells": 0, "device_hours": 0.0, "dollars": 0.0}
    for kind in [*kinds, "all"]:
        plan = planned if kind == "all" else planned["by_kind"].get(kind, nothing)
        real = found if kind == "all" else found["by_kind"].get(kind, nothing)
        rows.append((
            LINES.get(kind, kind), f"{plan['cells']} cells", f"{real['cells']} cells",
            f"{plan['device_hours']:.3g}", f"{real['device_hours']:.3g}",
            text.dollars(plan["dollars"]), text.dollars(real["dollars"]),
        ))  # fmt: skip
    lines = [
        f"\nablation {outcome['name']} {outcome['status']}: {outcome['ended']} of "
        f"{outcome['cells']} cells",
        text.columns(rows, left=1),
        "start-up, compilation, evaluation and checkpoints are in what was spent, not in the plan",
        *_taken(outcome),
    ]
    if outcome["analysis"] is not None:
        lines += ["", format_analysis(outcome["analysis"])]
    return "\n".join(lines)
