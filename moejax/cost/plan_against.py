"""A run's plan against its bill: the difference as parts that add up to it.

The plan is the one that the run printed when it began. The order of the parts is fixed, since each
is counted with the ones before it done: first the work (tokens that were not trained, or trained
beyond the plan), then the devices' peak, then their utilisation, each at the plan's rate; then what
the plan leaves out, phase by phase; last, the rate itself over all device-hours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.cost.redone import Kept
from moejax.cost.segments import Segment

UNITS = ("device_hours", "dollars", "tokens", "model_flops")
# What a part means, in the order in which they are counted and printed.
PARTS = {
    "work": "tokens not trained, or beyond the plan",
    "peak": "devices of another peak",
    "utilisation": "MFU",
    "redone": "redone steps",
    "restarts": "start-up and compilation after restarts",
    "startup": "start-up",
    "compile": "compilation",
    "data_wait": "waiting for data",
    "rollout": "rollouts",
    "eval": "evaluation",
    "checkpoint": "checkpoints",
    "other": "other",
    "price": "price",
}
_RECORDED = (
    "tokens", "train_flops", "mfu", "mfu_source", "peak_flops", "peak_source", "hardware",
    "devices", "device_hours", "wall_days", "price", "dollars", "energy_kwh", "co2_kg", "range",
)  # fmt: skip


def record(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a ledger keeps of ``moejax.cost.plan.make_plan``'s result."""
    return {name: plan[name] for name in _RECORDED}


def recorded(parts: Sequence[Segment]) -> dict[str, Any] | None:
    """The plan that a run began with; None for a run that recorded none."""
    plans = (part.header.get("plan") for part in parts)
    return next((plan for plan in plans if plan is not None), None)


def against_plan(
    plan: Mapping[str, Any], parts: Sequence[Segment], kept: Sequence[Kept] | None
) -> dict[str, Any]:
    """Planned, actual, the difference and its parts.

    Args:
      plan: what ``record`` kept.
      parts: the run's segments.
      kept: what of them the final model has seen; None where that is not known: nothing is
        counted as redone then, and what was shows as work beyond the plan.

    Returns:
      ``planned`` and ``actual``, with UNITS, ``wall_hours``, ``mfu`` (of the steps kept) and
      ``dollars_per_hour``, the plan's ``range`` beside it; ``difference`` by unit;
      ``parts``, by name (PARTS) and unit. For every unit the parts add up to the difference.
    """
    shares = [entry.share for entry in kept] if kept else [1.0] * len(parts)
    hours = [part.device_hours for part in parts]
    found = {name: dict.fromkeys(UNITS, 0.0) for name in PARTS}

    train = [h["train"] * share for h, share in zip(hours, shares, strict=True)]
    flops = [_done(part, "model_flops") * s for part, s in zip(parts, shares, strict=True)]
    tokens = [_done(part, "tokens") * s for part, s in zip(parts, shares, strict=True)]
    peak = _mean_peak(parts, train)
    found["work"] |= {
        "tokens": sum(tokens) - plan["tokens"], "model_flops": sum(flops) - plan["train_flops"],
    }  # fmt: skip
    found["redone"] |= {
        "device_hours": sum(h["train"] for h in hours) - sum(train),
        "tokens": sum(_done(part, "tokens") for part in parts) - sum(tokens),
        "model_flops": sum(_done(part, "model_flops") for part in parts) - sum(flops),
    }
    _split_training(found, plan, sum(train), sum(flops), peak)
    for i, phases in enumerate(hours):
        for phase, value in phases.items():
            if phase == "train":
                continue
            again = i > 0 and phase in ("startup", "compile")
            found["restarts" if again else phase]["device_hours"] += value

    rate = plan["price"]["dollars_per_hour"]
    for part in found.values():
        part["dollars"] = part["device_hours"] * rate
    spent = sum((p.rate - rate) * sum(h.values()) for p, h in zip(parts, hours, strict=True))
    found["price"]["dollars"] = spent
    planned, actual = _planned(plan), _actual(parts, peak, sum(train), sum(flops))
    return {
        "planned": planned,
        "actual": actual,
        "difference": {unit: actual[unit] - planned[unit] for unit in UNITS},
        "parts": found,
    }


def _split_training(
    found: dict[str, dict[str, float]], plan: Mapping[str, Any], hours: float, flops: float,
    peak: float | None,
) -> None:  # fmt: skip
    """Device-hours of the kept steps against the plan's, as work, peak and utilisation."""
    planned = plan["device_hours"]
    planned_speed = plan["peak_flops"] / plan["devices"] * plan["mfu"] * 3600  # FLOP/device-hour
    as_planned = flops / planned_speed
    at_peak = as_planned if peak is None else flops / (peak * plan["mfu"] * 3600)
    found["work"]["device_hours"] = as_planned - planned
    found["peak"]["device_hours"] = at_peak - as_planned
    found["utilisation"]["device_hours"] = hours - at_peak


def _mean_peak(parts: Sequence[Segment], train: Sequence[float]) -> float | None:
    """FLOP/s of one device, over the device-hours of kept steps; None where it is not known."""
    if not sum(train) or any(
        not part.header["peak_flops"] for part, h in zip(parts, train, strict=True) if h
    ):
        return None
    each = [(part.header["peak_flops"] or 0.0) / part.header["devices"] for part in parts]
    return sum(p * h for p, h in zip(each, train, strict=True)) / sum(train)


def _done(part: Segment, unit: str) -> float:
    return part.charge.get(unit, 0)


def _planned(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "device_hours": plan["device_hours"],
        "dollars": plan["dollars"]["rental"],
        "tokens": plan["tokens"],
        "model_flops": plan["train_flops"],
        "wall_hours": plan["wall_days"] * 24,
        "mfu": plan["mfu"],
        "mfu_source": plan["mfu_source"],
        "dollars_per_hour": plan["price"]["dollars_per_hour"],
        "range": plan["range"],
    }


def _actual(
    parts: Sequence[Segment], peak: float | None, train: float, flops: float
) -> dict[str, Any]:
    hours = [sum(part.device_hours.values()) for part in parts]
    dollars = sum(part.rate * h for part, h in zip(parts, hours, strict=True))
    return {
        "device_hours": sum(hours),
        "dollars": dollars,
        "tokens": sum(_done(part, "tokens") for part in parts),
        "model_flops": sum(_done(part, "model_flops") for part in parts),
        "wall_hours": sum(sum(part.seconds.values()) for part in parts) / 3600,
        "mfu": flops / (peak * train * 3600) if peak else None,
        "dollars_per_hour": dollars / sum(hours) if sum(hours) else None,
    }
