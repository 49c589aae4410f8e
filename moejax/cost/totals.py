"""Sums over runs: headline against all-in, and what makes the difference; by stage, by status."""

from collections.abc import Iterable, Sequence
from typing import Any

from moejax.cost import lenses
from moejax.cost.redone import Kept
from moejax.cost.segments import Segment

SUMS = ("dollars", "device_hours", "tokens", "model_flops")
ROLLOUT = ("rollout_tokens", "rollout_flops")  # what a run sampled, beside what it trained on
KNOWN = ("dollars_owned", "energy_kwh", "co2_kg")  # None where a part is not known
# Stages of a model in their order, by the name that ``stage`` of a config gives them; any other
# name is a stage of its own, after these.
STAGES = {
    "pretrain": "pre-training",
    "sft": "supervised fine-tuning",
    "rl_rollout": "RL rollouts",
    "rl_train": "RL training",
    "distill": "distillation",
    "eval": "evaluation",
}
# Where a run's device-hours went. ``steps``: training that its last state has seen, and rollouts;
# ``redone``: training that it has not; ``around``: start-up, compilation, evaluation, checkpoints;
# ``stalls``: waiting for data, and what belongs to no phase.
USES = ("steps", "redone", "around", "stalls")
_USE_OF_PHASE = {
    "startup": "around", "compile": "around", "eval": "around", "checkpoint": "around",
    "data_wait": "stalls", "other": "stalls", "rollout": "steps",
}  # fmt: skip
# Runs that are not final, by how they ended: experiments that ran as far as they should, and others
ABLATIONS = ("completed", "budget")


def use(parts: Sequence[Segment], kept: Sequence[Kept] | None) -> dict[str, dict[str, float]]:
    """``device_hours`` and ``dollars`` of a run by USES; they add up to the run's.

    Args:
      parts: the run's segments.
      kept: what of them the last state has seen; None where it is not known, and nothing is
        counted as redone.
    """
    found = {name: {"device_hours": 0.0, "dollars": 0.0} for name in USES}
    for i, part in enumerate(parts):
        share = kept[i].share if kept else 1.0
        for phase, hours in part.device_hours.items():
            if phase == "train":
                split = {"steps": hours * share, "redone": hours * (1 - share)}
            else:
                split = {_USE_OF_PHASE[phase]: hours}
            for name, value in split.items():
                found[name]["device_hours"] += value
                found[name]["dollars"] += value * part.rate
    return found


def total(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The totals of ``moejax ledger --format=json``.

    Returns:
      ``headline`` (runs marked final) and ``all_in`` (every run), each with ``runs`` (how many),
      SUMS (tokens and FLOPs of training and of rollouts) and KNOWN; ``by_stage`` and
      ``by_status``, the same for the runs of each (rollouts of a run of stage ``rl_train`` are
      stage ``rl_rollout``); ``ratio`` of dollars, all-in over headline, None without a headline;
      and ``made_of``, parts of the all-in figure that add up to it, with ``device_hours`` and
      ``dollars``: USES of the final runs, then ``ablations`` (other runs that ended as they
      should) and other runs by status.
    """
    headline, all_in = _sums(lenses.headline(runs)), _sums(lenses.all_in(runs))
    return {
        "headline": headline,
        "all_in": all_in,
        "ratio": all_in["dollars"] / headline["dollars"] if headline["dollars"] else None,
        "made_of": _made_of(runs),
        "by_stage": _by_stage(runs),
        "by_status": _grouped(runs, "status"),
    }


def sum_known(values: Iterable[float | None]) -> float | None:
    """The sum, or None where a part is unknown: a total must not leave anything out."""
    values = list(values)
    return None if None in values else sum(values)


def _sums(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = {name: sum(run[name] for run in runs) for name in SUMS}
    for name, sampled in zip(("tokens", "model_flops"), ROLLOUT, strict=True):
        sums[name] += sum(run[sampled] for run in runs)
    known = {name: sum_known(run[name] for run in runs) for name in KNOWN}
    return {"runs": len(runs), **sums, **known}


def _grouped(runs: Sequence[dict[str, Any]], field: str) -> dict[str, dict[str, Any]]:
    names = list(dict.fromkeys(run[field] for run in runs))
    return {name: _sums([run for run in runs if run[field] == name]) for name in names}


def _by_stage(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    groups = _grouped([piece for run in runs for piece in _stages_of(run)], "stage")
    order = list(STAGES)
    place = lambda name: order.index(name) if name in order else len(order)
    return {name: groups[name] for name in sorted(groups, key=place)}


def _stages_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A run, or its rollouts and the rest, which share what is counted by time."""
    seconds = run["seconds"]["rollout"]
    if run["stage"] != "rl_train" or not seconds:
        return [run]
    share = seconds / run["wall_seconds"]
    timed = ("dollars", "device_hours", *KNOWN)
    scaled = lambda by: {k: None if run[k] is None else run[k] * by for k in timed}
    rollouts = {**run, **scaled(share), "stage": "rl_rollout", "tokens": 0, "model_flops": 0.0}
    return [rollouts, {**run, **scaled(1 - share), **dict.fromkeys(ROLLOUT, 0)}]


def _made_of(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {
        name: {"runs": 0, "device_hours": 0.0, "dollars": 0.0} for name in (*USES, "ablations")
    }
    for run in runs:
        if run["final"]:
            pieces = run["use"]
        else:
            pieces = {"ablations" if run["status"] in ABLATIONS else run["status"]: run}
        for name, piece in pieces.items():
            entry = found.setdefault(name, {"runs": 0, "device_hours": 0.0, "dollars": 0.0})
            entry["runs"] += 1
            for unit in ("device_hours", "dollars"):
                entry[unit] += piece[unit]
    return found
