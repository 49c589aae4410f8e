"""Runs an ablation: plans it, runs the cells that are missing, and says what came of it."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from moejax.ablation import calibrate, cleaning, grid, shares, text, tuning
from moejax.ablation import spec as specs
from moejax.ablation.grid import Cell, Rates
from moejax.ablation.record import Folder, check_workdir, result, totals
from moejax.ablation.runners import Children, InProcess, Nursery, Runner
from moejax.ablation.spec import AblationSpec
from moejax.analysis.ablation import analyse
from moejax.analysis.ablation_record import ABLATION, ANALYSIS, FORMAT, PLAN
from moejax.config import UserError
from moejax.training import prepare, run_dir
from moejax.training.loop import Interrupted, RunFailed

Say = Callable[[str], None]
VERSIONS = ("code", "packages", "python", "machine")


@dataclasses.dataclass
class State:
    """An ablation while it runs.

    Attributes:
      folder: its files.
      spec: what it is.
      rates: what a step takes, by variant.
      calibration: what was measured, by variant.
      cells: those known so far.
      planned: totals of the cells known when the ablation began; see ``planned``.
      tuning: outcomes, by variant, once decided.
      rows: lines of ``results.jsonl`` by cell.
      running: cells that were begun and have not ended.
      begun: whether the folder had a plan before.
    """

    folder: Folder
    spec: AblationSpec
    rates: dict[str, Rates]
    calibration: dict[str, Any]
    cells: list[Cell]
    planned: dict[str, Any]
    tuning: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    running: set[str] = dataclasses.field(default_factory=set)
    begun: bool = False

    def write_plan(self) -> None:
        """Writes ``plan.json``."""
        self.folder.write(PLAN, {
            "cells": [cell.to_dict() for cell in self.cells],
            "rates": {name: dataclasses.asdict(rates) for name, rates in self.rates.items()},
            "calibration": self.calibration,
            "tuning": self.tuning,
            "planned": self.planned,
        })  # fmt: skip

    def ready(self) -> list[Cell]:
        """Cells that can begin now, in order."""
        return [
            cell for cell in self.cells
            if cell.id not in self.rows and cell.id not in self.running
            and cell.learning_rate is not None
            and (cell.trunk is None or not cell.from_step or cell.trunk in self.rows)
        ]  # fmt: skip

    def end(self, cell: Cell, error: str | None) -> None:
        """Records a cell that ended, for good."""
        self.running.discard(cell.id)
        row = result(self.folder, cell, error)
        self.folder.append(row)
        self.rows[cell.id] = row
        self.settle()

    def settle(self) -> None:
        """What follows from the cells that ended: learning rates, checkpoints to delete."""
        for variant in self.spec.variants if self.spec.tuning else ():
            cells = [c for c in self.cells if c.kind == "tune" and c.variant == variant]
            if variant in self.tuning or any(cell.id not in self.rows for cell in cells):
                continue
            found, more = tuning.decide(
                self.spec, variant, self.rates[variant], self.cells, self.rows
            )
            self._add(more) if more else self._choose(variant, found)
            self.write_plan()
            self.settle()
            return
        status = {name: row["status"] for name, row in self.rows.items()}
        cleaning.clean(self.folder, self.spec, self.cells, status)

    def _add(self, more: list[Cell]) -> None:
        last = max(i for i, cell in enumerate(self.cells) if cell.kind == "tune")
        self.cells[last + 1 : last + 1] = more

    def _choose(self, variant: str, found: dict[str, Any]) -> None:
        self.tuning[variant] = found
        for i, cell in enumerate(self.cells):
            if cell.variant == variant and cell.kind != "tune":
                self.cells[i] = dataclasses.replace(cell, learning_rate=found["chosen"])

    def untrainable(self) -> list[Cell]:
        """Cells without a learning rate, since none of the bracket was trained to its end."""
        given_up = [name for name, found in self.tuning.items() if found["chosen"] is None]
        return [
            cell for cell in self.cells
            if cell.variant in given_up and cell.kind != "tune" and cell.id not in self.rows
        ]  # fmt: skip


def planned(cells: list[Cell], rates: dict[str, Rates]) -> dict[str, Any]:
    """Totals of a plan: ``cells``, ``tokens``, ``flops``, ``device_hours``, ``dollars``, ``low``
    and ``high``; the same by kind of cell under ``by_kind``."""

    def total(part: list[Cell]) -> dict[str, float]:
        work = [(cell.own_steps, rates[cell.rates_name]) for cell in part]
        return {
            "cells": len(part),
            "tokens": sum(steps * rate.tokens for steps, rate in work),
            "flops": sum(steps * rate.flops for steps, rate in work),
            **totals([cell.planned for cell in part]),
        }

    kinds = dict.fromkeys(cell.kind for cell in cells)
    by_kind = {kind: total([cell for cell in cells if cell.kind == kind]) for kind in kinds}
    return {**total(cells), "by_kind": by_kind}


def ablate(
    spec: AblationSpec,
    workdir: str,
    *,
    processes: int = 0,
    dry_run: bool = False,
    command: str = "",
    bill_process: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Runs an ablation, or what is missing of it.

    Args:
      spec: the ablation.
      workdir: its folder.
      processes: cells that run at once, each in a process of its own and on its share of the
        machine; 0 runs them here, one after another.
      dry_run: plan and say it, write nothing.
      command: that it was asked with, for the record.
      bill_process: charge the time since this process began to the first run in it.
      say: takes lines for the user.

    Returns:
      ``name``, ``workdir``, ``status`` (``planned``, ``completed``, ``failed`` with ``failures``,
      or ``interrupted``), ``cells`` (how many) and ``ended``, ``planned`` and ``spent`` (see
      ``text.spent``), ``taken`` (see ``text.taken``), ``tuning`` by variant, and ``analysis``, from
      ``moejax.analysis.ablation.analyse``, None where there is none yet.

    Raises:
      UserError: a config, machine or folder that cannot be used; nothing has been written then,
        unless a measured second showed it.
    """
    parts, environment = shares.shares(processes), dict(os.environ)
    folder = check_workdir(workdir)
    nursery = Nursery(folder, environment) if processes else None
    with shares.within(parts[0], planning=processes > 0):
        setups = _prepare(spec)
        grid.check_text(spec, setups)
        record = _record(spec, setups, command)
        state = _state(folder, spec, setups, record)
        if dry_run:
            say(text.format_plan(spec, state.cells, state.rates, state.planned))
            return {**_outcome(state, "planned"), "analysis": None}
        with folder.held():
            status = _run(state, setups, record, parts, nursery, bill_process, say)
            found = None if status == "interrupted" else analyse(folder.path)
            if found is not None:
                folder.write(ANALYSIS, found)
    return {**_outcome(state, status), "analysis": found}


def _run(
    state: State, setups: dict[str, prepare.Setup], record: dict[str, Any],
    parts: list[shares.Share], nursery: Nursery | None, bill_process: bool, say: Say,
) -> str:  # fmt: skip
    """Everything that writes; returns the status."""
    folder, spec = state.folder, state.spec
    changed = _begin(state, record)
    for line in changed:
        say(line)
    cleaning.remove_torn(folder)
    try:
        if not state.begun:
            # The time since this process began is charged once: to the first run in it.
            if _calibrate(state, setups, parts[0], nursery, bill_process, say):
                bill_process = False
            state.write_plan()
        say(text.format_plan(spec, state.cells, state.rates, state.planned))
        state.rows = {row["id"]: row for row in folder.results()}
        runner = (
            Children(nursery, parts) if nursery else InProcess(folder, spec, bill_process)
        )  # fmt: skip
        try:
            _cells(state, runner, say)
        finally:
            runner.close()
    except (Interrupted, KeyboardInterrupt):
        say("interrupted; the same command goes on from here")
        return "interrupted"
    return (
        "failed" if any(row["status"] == "failed" for row in state.rows.values()) else "completed"
    )


def _cells(state: State, runner: Runner, say: Say) -> None:
    """Runs cells until none is left."""
    state.settle()
    while True:
        for cell in state.untrainable():
            state.end(cell, "no learning rate of the variant's bracket was trained to its end")
            say(text.format_row(state.rows[cell.id], state.cells, state.rows, state.spec.metric))
        for cell in state.ready()[: runner.room]:
            state.running.add(cell.id)
            runner.start(cell)
        if not state.running:
            return
        cell, error = runner.wait()
        state.end(cell, error)
        say(text.format_row(state.rows[cell.id], state.cells, state.rows, state.spec.metric))


def _prepare(spec: AblationSpec) -> dict[str, prepare.Setup]:
    """Every variant, checked against this machine and the text."""
    setups = {}
    for name in spec.variants:
        try:
            setups[name] = prepare.prepare(spec.run_config(name))
            if spec.upcycled(name):
                setups[grid.dense_name(name)] = prepare.prepare(spec.dense_config(name))
        except UserError as error:
            raise UserError(f"variants.{name}: {error}") from None
    return _with_one_peak(setups)


def _with_one_peak(setups: dict[str, prepare.Setup]) -> dict[str, prepare.Setup]:
    """The same with one peak for a chip: a CPU's is measured for every run, and plans of variants
    with equal FLOPs would differ by that."""
    peaks: dict[tuple[str, int], float] = {}
    for setup in setups.values():
        billing = setup.billing
        chips = billing.hardware, billing.devices
        peaks[chips] = max(billing.peak_flops, peaks.get(chips, 0.0))
    return {
        name: dataclasses.replace(setup, billing=dataclasses.replace(
            setup.billing, peak_flops=peaks[setup.billing.hardware, setup.billing.devices]))
        for name, setup in setups.items()
    }  # fmt: skip


def _record(spec: AblationSpec, setups: dict[str, prepare.Setup], command: str) -> dict[str, Any]:
    """What ``ablation.json`` will hold."""
    reference = setups[spec.reference]
    described = run_dir.describe(reference.config, reference.dataset)
    return {
        "format": FORMAT,
        "spec": spec.to_dict(),
        **{name: described[name] for name in VERSIONS},
        "data": {name: setup.dataset.fingerprint for name, setup in setups.items()},
        "command": command,
    }


def _state(
    folder: Folder, spec: AblationSpec, setups: dict[str, prepare.Setup], record: dict[str, Any]
) -> State:
    """The ablation as it stands: from its folder, or planned anew; nothing is written.

    Raises:
      UserError: the folder holds another ablation, or one that began on another machine.
    """
    shown = f"--workdir = {str(folder.path)!r}"
    planned_before = (folder.path / PLAN).is_file()
    if planned_before:  # without a plan no cell has run, and everything may change
        old = folder.read(ABLATION)
        changed = specs.differences(old["spec"], record["spec"])
        if changed:
            raise UserError(
                f"{shown}: holds an ablation with another config: {'; '.join(changed)}; use that "
                "one's values, or a new --workdir"
            )
        if old["data"] != record["data"]:
            raise UserError(
                f"{shown}: the corpus is not the one that the ablation began with; restore the "
                "text, or use a new --workdir"
            )
    given = spec.budget.seconds_per_step or {}
    rates = {name: grid.measure(setup, given.get(name)) for name, setup in setups.items()}
    if not planned_before:
        calibration = {name: {"seconds_per_step": value} for name, value in given.items()}
        cells = grid.make_cells(spec, rates)
        return State(folder, spec, rates, calibration, cells, planned(cells, rates))
    plan = folder.read(PLAN)
    for name, now in rates.items():
        then = plan["rates"][name]
        if (then["hardware"], then["devices"]) != (now.hardware, now.devices):
            raise UserError(
                f"{shown}: its cells run on {then['devices']} x {then['hardware']} each, and here "
                f"on {now.devices} x {now.hardware}; use the same machine and --processes, or a "
                "new --workdir"
            )
    rates = {name: Rates(**values) for name, values in plan["rates"].items()}
    cells = [Cell.from_dict(values) for values in plan["cells"]]
    return State(
        folder, spec, rates, plan["calibration"], cells, plan["planned"], plan["tuning"],
        begun=True,
    )  # fmt: skip


def _begin(state: State, record: dict[str, Any]) -> list[str]:
    """Writes ``ablation.json``; of one that has begun, lines that say what changed since.

    Raises:
      UserError: another process has planned the ablation since this one looked.
    """
    folder = state.folder
    if not state.begun:
        if (folder.path / PLAN).is_file():
            raise UserError(
                f"--workdir = {str(folder.path)!r}: another process has begun this ablation "
                "meanwhile; give the command again to go on from there"
            )
        folder.write(ABLATION, record)
        return []
    old = folder.read(ABLATION)
    parts = lambda values: {name: values.get(name) for name in VERSIONS}
    changed = specs.differences(parts(old), parts(record))
    folder.write(ABLATION, {**old, "spec": record["spec"]})
    return [f"warning: changed since the ablation began: {'; '.join(changed)}"] if changed else []


def _calibrate(
    state: State, setups: dict[str, prepare.Setup], share: shares.Share, nursery: Nursery | None,
    bill_process: bool, say: Say,
) -> bool:  # fmt: skip
    """Measures what a budget of time or dollars needs, and plans anew by that.

    Returns:
      Whether anything was measured.
    """
    spec = state.spec
    if not spec.budget.by_time or spec.budget.seconds_per_step is not None:
        return False
    for i, name in enumerate(spec.variants):
        try:
            if nursery is None:
                first = bill_process and i == 0
                found = calibrate.calibrate(state.folder, spec, name, bill_process=first)
            else:
                found = nursery.calibrate(share, name)
        except RunFailed as error:
            if isinstance(error, Interrupted):
                raise
            raise UserError(f"variants.{name}: its step cannot be measured: {error}") from None
        state.calibration[name] = found
        state.rates[name] = grid.measure(setups[name], found["seconds_per_step"])
        say(text.format_calibration(name, found))
    state.cells = grid.make_cells(spec, state.rates)
    state.planned = planned(state.cells, state.rates)
    return True


def _outcome(state: State, status: str) -> dict[str, Any]:
    rows = list(state.rows.values())
    return {
        "name": state.spec.name,
        "workdir": str(state.folder.path),
        "status": status,
        "cells": len(state.cells),
        "ended": len(rows),
        "failures": [{"id": r["id"], "error": r["error"]} for r in rows if r["status"] == "failed"],
        "planned": state.planned,
        "spent": text.spent(state.cells, state.rows, state.calibration),
        "taken": text.taken(state.spec, state.cells, state.rows),
        "tuning": state.tuning,
    }
