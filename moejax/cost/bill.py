"""What ``ledger.jsonl`` files say: one run's bill, and that of any number of runs."""

import datetime
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from moejax.config import ConfigError, UserError
from moejax.cost import plan_against, redone, totals
from moejax.cost.bill_exchange import exchange_bill
from moejax.cost.segments import FILE_NAME, PHASES, Segment, ledger_errors, segments

NOT_RUNS = ("checkpoints", "tensorboard")
_SUMS = (*totals.SUMS, "steps", *totals.ROLLOUT)
_KNOWN = (*totals.KNOWN, "energy_measured_kwh")


def read(directory: str | os.PathLike) -> dict[str, Any]:
    """The bill of one run directory, all of its segments together.

    Returns:
      One entry of ``runs`` in ``moejax ledger --format=json``. ``peak_flops`` is that of all the
      devices together. ``mfu`` is model FLOPs over (seconds of phase train x peak): how well the
      devices computed while training. ``goodput`` is seconds of phases train and rollout over wall
      seconds: how much of the time they did. Both are None without training. ``energy_kwh`` is at
      the data centre's meter: measured where the devices have counters, else an estimate (see
      ``Segment.consumption``), None where the chip's power is not published either; of
      ``dollars_owned`` see ``Segment.owned_dollars``. ``redone`` is
      what was trained again after a resume from an older checkpoint (``moejax.cost.redone``; None
      where the ledger does not say), ``tokens_seen`` what the last state has seen, ``use`` where
      device-hours and dollars went (``moejax.cost.totals.USES``), ``idle`` the time between
      segments by the wall clock, which is not billed, ``exchange`` what tokens sent to other
      devices (``moejax.cost.bill_exchange``; None where they sent nothing), and ``plan`` the plan
      against the bill (``moejax.cost.plan_against``; None without a recorded plan).

    Raises:
      UserError: no ledger there, or none of its lines can be read.
    """
    path = pathlib.Path(directory) / FILE_NAME
    if not path.is_file():
        raise UserError(f"{directory}: holds no {FILE_NAME}; give a run directory")
    parts = segments(path)
    if not parts:
        raise UserError(f"{path}: holds no readable line; was the run killed as it began?")
    try:
        with ledger_errors(path):
            return _run(path, parts)
    except ConfigError as error:  # a chip or region of another moejax
        raise UserError(f"{path}: {error}") from error


def spent(path: pathlib.Path) -> dict[str, float]:
    """Sums over the segments of a ledger file, each at its own rate: all 0 for a new file.

    Returns:
      ``dollars``, ``device_hours``, ``tokens``, ``model_flops`` (both of training),
      ``rollout_flops`` and ``wall_seconds``.

    Raises:
      UserError: not a ledger, or one of a newer version.
    """
    with ledger_errors(path):
        bills = [segment.bill() for segment in segments(path)]
        names = (*totals.SUMS, "wall_seconds", "rollout_flops")
        return {name: sum(b[name] for b in bills) for name in names}


def _run(path: pathlib.Path, parts: list[Segment]) -> dict[str, Any]:
    last = parts[-1].header
    bills = [part.bill() for part in parts]
    statuses = [bill["status"] for bill in bills]
    seconds = {name: sum(part.seconds[name] for part in parts) for name in PHASES}
    wall = sum(seconds.values())
    total = {name: sum(bill[name] for bill in bills) for name in _SUMS}
    possible = sum(part.seconds["train"] * (part.header["peak_flops"] or 0.0) for part in parts)
    working = seconds["train"] + seconds["rollout"]
    kept = redone.kept(parts)
    plan = plan_against.recorded(parts)
    return {
        "id": last["run_id"],
        "path": str(path.parent),
        "status": "running" if "running" in statuses else statuses[-1],
        "stage": last["stage"],
        "final": last["final"],
        "device": last["hardware"],
        "devices": last["devices"],
        "peak_flops": last["peak_flops"],
        "price": last["price"],
        "region": last["region"],
        "seconds": seconds,
        "wall_seconds": wall,
        **total,
        "tokens_seen": None if kept is None else redone.tokens_seen(parts),
        "redone": None if kept is None else redone.summary(parts, kept),
        **{name: totals.sum_known(bill[name] for bill in bills) for name in _KNOWN},
        "energy_source": "; ".join(dict.fromkeys(bill["energy_source"] for bill in bills)),
        "energy_includes": bills[-1]["energy_includes"],
        "energy_reason": bills[-1]["energy_reason"],
        "mfu": total["model_flops"] / possible if possible else None,
        "goodput": working / wall if working else None,
        "use": totals.use(parts, kept),
        "idle": _idle(parts),
        "exchange": exchange_bill(parts),
        "plan": None if plan is None else plan_against.against_plan(plan, parts, kept),
        "segments": bills,
    }


def _idle(parts: Sequence[Segment]) -> dict[str, float]:
    """Time between segments, by the wall clock: what it would have cost to keep the devices.

    Time that the clock says passed backwards counts as none.
    """
    seconds = hours = dollars = 0.0
    for before, after in itertools.pairwise(parts):
        begun, ended = _time(after.header.get("time")), _time(before.charge.get("time"))
        if begun is None or ended is None:
            continue
        passed = max((begun - ended).total_seconds(), 0.0)
        seconds += passed
        hours += passed / 3600 * before.header["devices"]
        dollars += passed / 3600 * before.header["devices"] * before.rate
    return {"seconds": seconds, "device_hours": hours, "dollars": dollars}


def _time(label: str | None) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(label, "%Y-%m-%dT%H:%M:%SZ")
    except (TypeError, ValueError):
        return None


def run_directories(directories: Sequence[str | os.PathLike]) -> list[pathlib.Path]:
    """Every directory with a ledger in or under the given ones, sorted, each once.

    Raises:
      UserError: a directory that does not exist or holds no run.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}
    for directory in directories:
        if not os.path.isdir(directory):
            raise UserError(f"{directory}: no such directory; give run directories")
        below = sorted(_with_ledger(pathlib.Path(directory)))
        if not below:
            raise UserError(f"{directory}: holds no run (no {FILE_NAME}); give run directories")
        found |= {path.resolve(): path for path in below if path.resolve() not in found}
    return list(found.values())


def _with_ledger(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, inner, files in os.walk(directory):
        inner[:] = [name for name in inner if name not in NOT_RUNS]
        if FILE_NAME in files:
            yield pathlib.Path(folder)


def summarize(directories: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """The bill of all runs in or under some directories.

    Returns:
      ``runs``, a list of ``read``'s results; ``total`` with ``headline`` (runs marked final),
      ``all_in`` (every run), ``by_stage``, ``by_status``, ``ratio`` and ``made_of``, see
      ``moejax.cost.totals``; ``unreadable``, messages about ledgers that could not be read, whose
      cost is in no total.

    Raises:
      UserError: no run that can be read.
    """
    runs, unreadable = [], []
    for directory in run_directories(directories):
        try:
            runs.append(read(directory))
        except UserError as error:
            unreadable.append(str(error))
    if not runs:
        raise UserError(unreadable[0])
    return {"runs": runs, "total": totals.total(runs), "unreadable": unreadable}
