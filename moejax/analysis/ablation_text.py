"""An ablation's analysis as text: verdicts first, then what they rest on, then the bill."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.analysis.ablation_record import UNITS
from moejax.cost import text


def format_analysis(analysis: Mapping[str, Any]) -> str:
    """A table of the variants with their verdicts, and below it health, multipliers and bill.

    Args:
      analysis: from ``analyse``, or read from ``analysis.json``.
    """
    parts = [
        _head(analysis), _table(analysis), _verdicts(analysis), _pooled(analysis),
        _tuning(analysis), _troubles(analysis), _health(analysis), _multipliers(analysis),
        _scaling(analysis), _claim(analysis), _bill(analysis),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def compared_budget(analysis: Mapping[str, Any]) -> float:
    """The budget of an analysis' verdicts."""
    found = [v["difference"]["budget"] for v in analysis["variants"].values() if v["difference"]]
    return found[0] if found else analysis["budgets"][-1]


def _head(analysis: Mapping[str, Any]) -> str:
    budget, hold = compared_budget(analysis), analysis["hold"]
    return (
        f"{analysis['name']}: {analysis['metric']} (lower is better) at {text.parameters(budget)} "
        f"{UNITS.get(hold, hold)}, {len(analysis['seeds'])} seeds, on "
        f"{analysis['device'] or 'an unknown device'}"
    )


def _point(entry: Mapping[str, Any], budget: float) -> Mapping[str, Any]:
    return next(point for point in entry["by_budget"] if point["budget"] == budget)


def _table(analysis: Mapping[str, Any]) -> str:
    """One line a variant; ± is the half width of a 95 % t interval."""
    budget = compared_budget(analysis)
    rows = [["variant", "n", "mean ±", "difference ±", "p", "p (Holm)", "verdict", "FLOP", "time",
             "dollars", "MaxVio", "dropped"]]  # fmt: skip
    for name, entry in analysis["variants"].items():
        point, found = _point(entry, budget), entry["difference"]
        health = entry["health"]
        rows.append([
            name, str(point["n"]), _with_half(point["mean"], point["interval"]),
            "reference" if found is None else _with_half(found["mean"], found["interval"], "+"),
            *(_p(found and found[key]) for key in ("p", "p_holm")),
            found["verdict"] if found else "-",
            _or_dash(point["flops"], lambda x: text.si(x).replace(" ", "")),
            _or_dash(point["seconds"], text.duration),
            _or_dash(point["dollars"], text.dollars),
            _or_dash(health.get("max_violation"), lambda x: f"{x:.3g}"),
            _or_dash(health.get("dropped_share"), lambda x: f"{100 * x:.1f} %"),
        ])  # fmt: skip
    return text.columns(rows)


def _with_half(mean: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    if mean is None:
        return "-"
    if interval is None:
        return f"{mean:{sign}.4f}"
    return f"{mean:{sign}.4f} ± {(interval[1] - interval[0]) / 2:.4f}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _or_dash(value: Any, shown: Any) -> str:
    return "-" if value is None else shown(value)


def _verdicts(analysis: Mapping[str, Any]) -> str:
    """Each verdict as a sentence, with what the reader has to know of it."""
    lines = []
    for name, entry in analysis["variants"].items():
        if found := entry["difference"]:
            notes = "".join(f"; {note}" for note in found["notes"])
            lines.append(f"{name} against {analysis['reference']}: {found['text']}{notes}")
    return "\n".join(lines)


def _pooled(analysis: Mapping[str, Any]) -> str:
    pool = analysis["pooled"]
    if pool["sd"] is None:
        return ""
    left = "".join(f"; left out: {name} ({why})" for name, why in pool["left_out"].items())
    return (
        f"paired by seed; error of one run pooled over {len(pool['variants'])} variants: "
        f"{pool['sd']:.3g} on {pool['df']} degrees of freedom; familywise error "
        f"{100 * analysis['alpha']:.0f} % by Holm; ± is 95 % of one alone{left}"
    )


def _tuning(analysis: Mapping[str, Any]) -> str:
    lines = []
    for name, entry in analysis["variants"].items():
        rate = entry["learning_rate"]
        if not rate["tried"] or rate["chosen"] is None:
            continue
        tried = ", ".join(f"{r:g}" for r, _ in rate["tried"])
        edge = ": AT THE EDGE of its bracket, the best may lie beyond" if rate["at_edge"] else ""
        lines.append(f"learning rate of {name}: {rate['chosen']:g} of {tried}{edge}")
    return "\n".join(lines)


def _troubles(analysis: Mapping[str, Any]) -> str:
    lines = [f"failed: {cell['id']}: {cell['error']}" for cell in analysis["failed"]]
    missing = analysis["missing"]
    if missing:
        shown = ", ".join(
            f"{c['variant']} seed {c['seed']} at {c['budget']:g}" for c in missing[:4]
        )
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        lines.append(f"unfinished: {len(missing)} cells are missing: {shown}{more}")
    return "\n".join(lines)


def _health(analysis: Mapping[str, Any]) -> str:
    """MaxVio by layer against the reference, where both have it."""
    lines = []
    for name, entry in analysis["variants"].items():
        found = entry["health"].get("max_violation_difference")
        if not found:
            continue
        layers = entry["health"].get("max_violation_by_layer_difference") or []
        each = ", ".join(
            f"{layer['mean']:+.2f}{_STARS[layer['verdict']]}"
            if layer and layer["mean"] is not None else "-" for layer in layers
        )  # fmt: skip
        by_layer = f"; by layer {each}" if each else ""
        lines.append(f"MaxVio of {name} less {analysis['reference']}'s: "
                     f"{_with_half(found['mean'], found['interval'], '+')}, "
                     f"p (Holm) {_p(found['p_holm'])}{by_layer}")  # fmt: skip
    if lines:
        lines.append("(* tells it apart at 5 % over all layers and variants)")
    return "\n".join(lines)


_STARS = {"better": "*", "worse": "*", "cannot tell": ""}


def _multipliers(analysis: Mapping[str, Any]) -> str:
    """A line a variant; axes with the same reason share it, and so do all variants."""
    lines = []
    shown = {_times(found) for axes in analysis["multipliers"].values() for found in axes.values()}
    if len(shown) == 1 and next(iter(shown)).startswith("none"):
        return f"multipliers: {shown.pop()}"
    for name, axes in analysis["multipliers"].items():
        target = next((f["target_loss"] for f in axes.values() if f["target_loss"]), None)
        at = "" if target is None else f" {analysis['metric']} {target:.4f}"
        reasons: dict[str, list[str]] = {}
        for axis, found in axes.items():
            reasons.setdefault(_times(found), []).append(axis)
        parts = "; ".join(f"{', '.join(same)}: {shown}" for shown, same in reasons.items())
        lines.append(
            f"{name} reaches {analysis['reference']}'s{at or ' loss'} with so many times fewer "
            f"{parts}"
        )
    return "\n".join(lines)


def _times(found: Mapping[str, Any]) -> str:
    if found["value"] is not None:
        low, high = found["interval"]
        return f"{found['value']:.2f} x [{low:.2f}, {high:.2f}]"
    if found["bound"] == "above":
        return f"above {found['interval'][0]:.2f} x ({found['why']})"
    if found["bound"] == "below":
        return f"below {found['interval'][1]:.2f} x ({found['why']})"
    return f"none ({found['why']})"


def _scaling(analysis: Mapping[str, Any]) -> str:
    lines = []
    for axis, found in analysis["scaling"].items():
        if "why" in found:
            lines.append(f"no fit over {axis}: {found['why']}")
            continue
        of, errors = found["coefficients"], found["errors"]
        beats = found["left_out_error"] < found["constant_error"]
        lines.append(
            f"over {axis}: L = {of['c']:.3g} + {of['a']:.3g} / x^{of['alpha']:.3g} (standard "
            f"error of alpha {errors['alpha']:.2g}); a variant left out is missed by "
            f"{100 * found['left_out_error']:.2f} %, by the mean of the others "
            f"{100 * found['constant_error']:.2f} %{'' if beats else ': not shown to follow it'}"
        )
    return "\n".join(lines)


def _claim(analysis: Mapping[str, Any]) -> str:
    claim = analysis["claim"]
    if not claim:
        return ""
    source = f" ({claim['source']})" if claim.get("source") else ""
    outcome = analysis["claim_outcome"]
    found = f"{outcome}: {analysis['claim_text']}" if outcome else analysis["claim_text"]
    return f"claim: {claim['text']}{source}\nhere: {found}"


def _bill(analysis: Mapping[str, Any]) -> str:
    bill = analysis["bill"]
    rows = [["", "device-hours", "dollars"]]
    planned = bill["planned"] or {}
    if "dollars" in planned:
        rows.append(_charge("planned", planned))
    rows.append(_charge("spent", bill["spent"]))
    if any(bill["calibration"].values()):
        rows.append(_charge("  of it calibration", bill["calibration"]))
    rows.append(_charge("  of it tuning", bill["tuning"]))
    rows.append(_charge("  of it failed", bill["failed"]))
    rows += [_charge(f"  {name}", found) for name, found in bill["by_variant"].items()]
    return text.columns(rows)


def _charge(label: str, found: Mapping[str, Any]) -> list[str]:
    hours = found.get("device_hours")
    return [label, _or_dash(hours, lambda h: f"{h:.3f}"), text.dollars(found.get("dollars"))]
