"""An ablation's folder: what it is, its plan, and one line for every cell that ended.

``ablation.json``: ``format``, ``spec``, ``code``, ``packages``, ``python``, ``machine``, ``data``
(fingerprint by variant) and ``command``. ``plan.json``: ``cells`` (``Cell.to_dict``), ``rates`` and
``calibration`` by variant (empty where no time was measured), ``tuning`` by variant, once decided,
and ``planned``, totals. ``results.jsonl``: one line a cell, see ``result``. ``analysis.json``:
``moejax.analysis.ablation.analyse``'s result. ``logs``: what each cell said.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.ablation.grid import Cell
from moejax.analysis.ablation_record import (
    ABLATION,
    FORMAT,
    PLAN,
    RESULTS,
    read_object,
    read_rows,
)
from moejax.config import UserError
from moejax.cost import bill
from moejax.training import run_dir
from moejax.training.manifest import write_whole
from moejax.training.metrics import read_metrics

RUNS, LOGS = "runs", "logs"
NEEDED = {
    ABLATION: ("format", "spec", "data"),
    PLAN: ("cells", "rates", "calibration", "tuning", "planned"),
}
CHARGED = ("tokens", "model_flops", "wall_seconds", "device_hours", "dollars")
LOCK_SECONDS = 5.0  # how long the children of a killed ablation may take to notice
LAST_SHARE = 0.1  # of the steps, over which a cell's router health is averaged


class Folder:
    """The files of one ablation.

    Args:
      path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path).absolute()
        self.lock_file: Any = None

    def run(self, cell_id: str) -> pathlib.Path:
        """A cell's run directory."""
        return self.path / RUNS / cell_id

    def log(self, cell_id: str) -> pathlib.Path:
        """Where what a cell says goes."""
        return self.path / LOGS / f"{cell_id}.log"

    @contextlib.contextmanager
    def logged(self, cell_id: str) -> Iterator[None]:
        """Sends what the body says to the cell's log."""
        with (
            open(self.log(cell_id), "a", buffering=1) as log,
            contextlib.redirect_stderr(log),
            contextlib.redirect_stdout(log),
        ):
            yield

    def exists(self) -> bool:
        """Whether there is an ablation here."""
        return (self.path / ABLATION).is_file()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder and holds it for this process.

        Raises:
          UserError: it cannot be written, or another process runs this ablation.
        """
        shown = f"--workdir = {str(self.path)!r}"
        try:
            for folder in (RUNS, LOGS):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.path / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"{shown}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        with self.lock_file:
            self._lock(shown)
            yield

    def _lock(self, shown: str) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{shown}: another process runs this ablation; wait for its end, or choose "
                        "another folder"
                    ) from None
                time.sleep(0.1)

    def read(self, name: str) -> dict[str, Any]:
        """What ``ablation.json`` or ``plan.json`` holds.

        Raises:
          UserError: it is missing or damaged, or of another format.
        """
        remedy = "use a new --workdir"
        values = read_object(self.path / name, remedy)
        lacking = [field for field in NEEDED[name] if field not in values]
        found = values.get("format", FORMAT)
        if lacking or found != FORMAT:
            why = f"has format {found!r}, not {FORMAT}"
            if lacking:
                why = f"lacks {', '.join(lacking)}"
            raise UserError(f"{str(self.path / name)!r}: {why}; restore the file, or {remedy}")
        return values

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a file as a whole, on the disk."""
        write_whole(self.path / name, json.dumps(values, indent=1) + "\n")

    def results(self) -> list[dict[str, Any]]:
        """The lines of ``results.jsonl``; one that a kill tore is left out.

        Raises:
          UserError: another line is damaged.
        """
        return read_rows(self.path / RESULTS)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a line to ``results.jsonl``, on the disk when this returns."""
        path = self.path / RESULTS
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        with open(path, "r+b" if path.exists() else "xb") as file:
            file.truncate(whole)  # what a kill tore
            file.seek(whole)
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def check_workdir(workdir: str) -> Folder:
    """The folder for an ablation: its own, an empty one, or none yet.

    Raises:
      UserError: it holds an ordinary run or other files, is a file, or cannot be written. Nothing
        is written here.
    """
    folder = Folder(workdir)
    if folder.exists():
        return folder
    if (folder.path / run_dir.CONFIG).is_file():
        raise UserError(
            f"--workdir = {workdir!r}: holds an ordinary run; give an ablation's folder or a new "
            "one"
        )
    leftover = {RUNS, LOGS, ".lock"}  # of an ablation that was killed as it began
    begun = folder.path.is_dir() and {entry.name for entry in folder.path.iterdir()} <= leftover
    if not begun or any((folder.path / RUNS).glob("*")):
        run_dir.check_workdir(workdir)
    return folder


def result(folder: Folder, cell: Cell, error: str | None) -> dict[str, Any]:
    """A line of ``results.jsonl``, from the run directory of a cell that ended.

    ``tokens``, ``model_flops``, ``train_seconds``, ``device_seconds`` and ``dollars`` are those of
    the training steps of the whole path from step 0, what a branch shares with its trunk included:
    what the model costs that has this loss. ``charged`` has what the cell's own ledger was charged,
    start-up, compilation and evaluation included, and what its trunk has done left out: what the
    ablation has to pay.

    Args:
      folder: the ablation's.
      cell: which.
      error: why it failed; None for one that is complete.
    """
    path = folder.run(cell.id)
    summary = _summary(path)
    charged = _charged(path)
    done = _own_work(path)
    shared = _shared(folder, cell)
    total = {name: done[name] + shared[name] for name in done}
    device_seconds = total["train_seconds"] * charged["devices"]
    if error is None and None in (summary.get("val_loss"), summary.get("loss")):
        error = "its loss is not a finite number"
    complete = error is None
    losses = {n: summary.get(n) if complete else None
              for n in ("val_loss", "val_bits_per_byte", "loss")}  # fmt: skip
    seconds = total["train_seconds"]
    tokens = summary.get("tokens", 0)
    if cell.upcycled:  # a branch's summary has its trunk's tokens already
        tokens += _summary(folder.run(cell.trunk)).get("tokens", 0)
    return {
        "id": cell.id,
        "variant": cell.variant,
        "seed": cell.seed,
        "budget": cell.budget,
        "kind": cell.kind,
        "learning_rate": cell.learning_rate,
        "factor": cell.factor,
        "status": "completed" if complete else "failed",
        "error": error,
        "steps": summary.get("step", 0),
        "tokens": tokens,
        "model_flops": total["model_flops"],
        "train_seconds": seconds,
        "device_seconds": device_seconds,
        "dollars": device_seconds / 3600 * charged["rate"],
        "device": charged["device"],
        "devices": charged["devices"],
        **losses,
        **_health(path, summary.get("step", 0)),
        "tokens_per_second": tokens / seconds if seconds else None,
        "charged": {name: charged[name] for name in CHARGED},
        "fingerprint": summary.get("fingerprint"),
    }  # fmt: skip


def _summary(path: pathlib.Path) -> dict[str, Any]:
    """A run's summary; empty where it has none."""
    try:
        return json.loads((path / run_dir.SUMMARY).read_text())
    except (OSError, ValueError):
        return {}


def _charged(path: pathlib.Path) -> dict[str, Any]:
    """What the ledger of a run says; nothing for a run that did not get so far."""
    try:
        found = bill.read(path)
    except UserError:
        zero = dict.fromkeys(
            ("tokens", "model_flops", "wall_seconds", "device_hours", "dollars"), 0
        )
        return {**zero, "rate": 0.0, "device": None, "devices": 0}
    rate = found["price"]["dollars_per_hour"]
    return {**found, "rate": rate}


def _own_work(path: pathlib.Path) -> dict[str, float]:
    """Training that is in a run's last state, without what was redone: seconds and FLOPs."""
    try:
        found = bill.read(path)
    except UserError:
        return {"train_seconds": 0.0, "model_flops": 0.0}
    again = found["redone"] or {"seconds": 0.0, "model_flops": 0.0}
    return {
        "train_seconds": found["seconds"]["train"] - again["seconds"],
        "model_flops": found["model_flops"] - again["model_flops"],
    }


def _shared(folder: Folder, cell: Cell) -> dict[str, float]:
    """A branch's share of its trunk's training: as many of the trunk's steps, at their mean."""
    nothing = {"train_seconds": 0.0, "model_flops": 0.0}
    if cell.trunk is None or not cell.from_step:
        return nothing
    path = folder.run(cell.trunk)
    work = _own_work(path)
    steps = _summary(path).get("step", 0)
    share = min(cell.from_step / steps, 1.0) if steps else 0.0
    return {name: share * value for name, value in work.items()}


def _health(path: pathlib.Path, steps: int) -> dict[str, Any]:
    """Balance and drops, the mean over the last tenth of the steps; None of a dense model."""
    names = ("max_violation", "max_violation_by_layer", "dropped_share")
    try:
        rows = [row for row in read_metrics(path) if _has_health(row, names)]
    except UserError:
        rows = []
    late = [row for row in rows if row["step"] > (1 - LAST_SHARE) * steps] or rows[-1:]
    mean = lambda name: np.mean([row[f"router/{name}"] for row in late], axis=0).tolist()
    return {name: mean(name) if late else None for name in names}


def _has_health(row: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether a line of the metrics has the routers' measures, all of them finite."""
    values = [row.get(f"router/{name}") for name in names]
    return None not in values and None not in values[1]


def totals(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name over mappings of the same names."""
    names = rows[0] if rows else ()
    return {name: sum(row[name] for row in rows) for name in names}
