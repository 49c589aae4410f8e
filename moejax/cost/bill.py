"""What ``ledger.jsonl`` files say: one run's bill, and that of any number of runs.

A file holds segments, one for each process that worked on the run. A segment is an ``open`` line
(who, on what, at which rate), ``charge`` lines whose values are cumulative within the segment, so
that a lost or torn line loses at most one interval, and a ``close`` line with the final values and
a status. Lines that do not parse are passed over.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psutil

from moejax.config import UserError
from moejax.cost import energy, lenses, text
from moejax.cost import hardware as chips

FILE_NAME = "ledger.jsonl"
VERSION = 1
PHASES = ("startup", "compile", "data_wait", "train", "eval", "checkpoint", "other")
STATUSES = ("completed", "budget", "interrupted", "failed")

_NOT_RUNS = ("checkpoints", "tensorboard")
_SUMS = ("dollars", "device_hours", "tokens", "model_flops")


@dataclasses.dataclass
class Segment:
    """One process's part of a run.

    Attributes:
      header: the ``open`` line: run_id, stage, hardware, devices, price, peak_flops, final,
        region, pue, energy (what the meter says of itself), host, pid, process_start.
      charge: the last whole ``charge`` or ``close`` line, empty before the first.
      status: of the ``close`` line; None where there is none.
    """

    header: dict[str, Any]
    charge: dict[str, Any] = dataclasses.field(default_factory=dict)
    closed: str | None = None

    @property
    def status(self) -> str:
        """As closed, or else ``running`` while its process lives on this host, or ``killed``."""
        return self.closed or ("running" if _alive(self.header) else "killed")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every phase."""
        return {name: self.charge.get("seconds", {}).get(name, 0.0) for name in PHASES}

    def bill(self) -> dict[str, Any]:
        """The segment's own figures, JSON-ready."""
        hours = sum(self.seconds.values()) / 3600
        device_hours = hours * self.header["devices"]
        found = self.consumption()
        return {
            "status": self.status,
            "started": self.header.get("time"),
            "device": self.header["hardware"],
            "devices": self.header["devices"],
            "price": self.header["price"],
            "wall_seconds": hours * 3600,
            "device_hours": device_hours,
            "dollars": device_hours * self.header["price"]["dollars_per_hour"],
            "tokens": self.charge.get("tokens", 0),
            "model_flops": self.charge.get("model_flops", 0.0),
            "steps": self.charge.get("steps", 0),
            **found,
            "co2_kg": energy.carbon_kg(found["energy_kwh"], self.header["region"]),
        }

    def consumption(self) -> dict[str, Any]:
        """The segment's energy: measured where it was, and else estimated.

        Returns:
          ``energy_kwh`` at the data centre's meter, None where it is not known;
          ``energy_measured_kwh``, that of the devices alone as their counters had it, None without;
          ``energy_source`` and ``energy_includes``, in words; ``energy_reason``, why not all of it
          is measured, None where it is.
        """
        header, charge = self.header, self.charge
        chip, pue = header["hardware"], header.get("pue")
        seconds = sum(self.seconds.values())
        measured_by = (header.get("energy") or {}).get("devices") or 0
        covered = min(charge.get("energy_seconds", 0.0), seconds) if measured_by else 0.0
        rest = (seconds - covered) / 3600 * header["devices"]
        estimate = energy.kilowatt_hours(chip, rest, pue)
        around = energy.overhead(chip, pue)
        words = f"x {around / _pue(header):.4g} for the server x {_pue(header):.4g} (PUE)"
        reason = charge.get("energy_reason") or (header.get("energy") or {}).get("reason") or None
        if not covered:
            return {
                "energy_kwh": estimate, "energy_measured_kwh": None, "energy_source": energy.SOURCE,
                "energy_includes": f"rated power x average load {words}", "energy_reason": reason,
            }  # fmt: skip
        kwh = charge["energy_joules"] / 3.6e6 * header["devices"] / measured_by
        source = charge["energy_source"]
        if covered < 0.99 * seconds:
            source += f" {text.percent(covered / seconds)} of the time, else {energy.SOURCE}"
        if measured_by != header["devices"]:
            source += f", {measured_by} of {header['devices']} devices"
        return {
            "energy_kwh": None if estimate is None else kwh * around + estimate,
            "energy_measured_kwh": kwh,
            "energy_source": source,
            "energy_includes": f"{header['energy']['includes']}; {words}",
            "energy_reason": reason,
        }


def _pue(header: dict[str, Any]) -> float:
    """The PUE that a segment is billed with."""
    pue = header.get("pue")
    return chips.lookup(header["hardware"]).pue if pue is None else pue


def segments(path: pathlib.Path) -> list[Segment]:
    """The segments of a ledger file, oldest first; whatever was torn is passed over.

    Args:
      path: a ``ledger.jsonl``; one that does not exist has no segments.

    Raises:
      UserError: written by a newer moejax.
    """
    found: dict[str, Segment] = {}
    if not path.exists():
        return []
    for line in path.read_bytes().split(b"\n"):
        record = _parse(line)
        if record is None:
            continue
        name = record["segment"]
        if record["event"] == "open":
            if record.get("version", 0) > VERSION:
                raise UserError(
                    f"{path}: written by a newer moejax (ledger version {record['version']}, "
                    f"this one reads {VERSION}); update moejax"
                )
            found[name] = Segment(record)
        elif name in found:
            found[name].charge = record
            found[name].closed = record.get("status") or found[name].closed
    return list(found.values())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"segment", "event"} <= record.keys() else None


def _alive(header: dict[str, Any]) -> bool:
    """Whether the process that wrote a header still runs on this host."""
    if header.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(header["pid"])
        # psutil knows start times to a second: the kernel's boot time is a whole number.
        same = abs(process.create_time() - header["process_start"]) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def read(directory: str | os.PathLike) -> dict[str, Any]:
    """The bill of one run directory, all of its segments together.

    Returns:
      One entry of ``runs`` in ``moejax ledger --format=json``. ``peak_flops`` is that of all the
      devices together. ``mfu`` is model FLOPs over (seconds of phase train x peak): how well the
      devices computed while training. ``goodput`` is seconds of phase train over wall seconds: how
      much of the time they did. Both are None without training. ``energy_kwh`` is at the data
      centre's meter: measured where the devices have counters, else an estimate (see
      ``Segment.consumption``), None where the chip's power is not published either.

    Raises:
      UserError: no ledger there, or none of its lines can be read.
    """
    path = pathlib.Path(directory) / FILE_NAME
    if not path.is_file():
        raise UserError(f"{directory}: holds no {FILE_NAME}; give a run directory")
    parts = segments(path)
    if not parts:
        raise UserError(f"{path}: holds no readable line; was the run killed as it began?")
    with _ledger_errors(path):
        return _run(path, parts)


def totals(path: pathlib.Path) -> dict[str, float]:
    """Sums over the segments of a ledger file, each at its own rate: all 0 for a new file.

    Returns:
      ``dollars``, ``device_hours``, ``tokens``, ``model_flops`` and ``wall_seconds``.

    Raises:
      UserError: not a ledger, or one of a newer version.
    """
    with _ledger_errors(path):
        bills = [segment.bill() for segment in segments(path)]
        return {name: sum(b[name] for b in bills) for name in (*_SUMS, "wall_seconds")}


@contextlib.contextmanager
def _ledger_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns what unexpected content of a file's lines raises into one clear line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a moejax ledger ({error!r} in its lines)") from error


def _run(path: pathlib.Path, parts: list[Segment]) -> dict[str, Any]:
    last = parts[-1].header
    bills = [part.bill() for part in parts]
    statuses = [bill["status"] for bill in bills]
    seconds = {name: sum(part.seconds[name] for part in parts) for name in PHASES}
    wall = sum(seconds.values())
    total = {name: sum(bill[name] for bill in bills) for name in (*_SUMS, "steps")}
    possible = sum(part.seconds["train"] * (part.header["peak_flops"] or 0.0) for part in parts)
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
        "energy_kwh": _sum_known(bill["energy_kwh"] for bill in bills),
        "co2_kg": _sum_known(bill["co2_kg"] for bill in bills),
        "energy_measured_kwh": _sum_known(bill["energy_measured_kwh"] for bill in bills),
        "energy_source": "; ".join(dict.fromkeys(bill["energy_source"] for bill in bills)),
        "energy_includes": bills[-1]["energy_includes"],
        "energy_reason": bills[-1]["energy_reason"],
        "mfu": total["model_flops"] / possible if possible else None,
        "goodput": seconds["train"] / wall if seconds["train"] else None,
        "segments": bills,
    }


def _sum_known(values: Iterable[float | None]) -> float | None:
    """The sum, or None where a part is unknown: a total must not leave anything out."""
    values = list(values)
    return None if None in values else sum(values)


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
        inner[:] = [name for name in inner if name not in _NOT_RUNS]
        if FILE_NAME in files:
            yield pathlib.Path(folder)


def summarize(directories: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """The bill of all runs in or under some directories.

    Returns:
      ``runs``, a list of ``read``'s results; ``total`` with ``headline`` (runs marked final) and
      ``all_in`` (every run), each with ``runs`` (how many), ``dollars``, ``device_hours``,
      ``tokens``, ``model_flops``, ``energy_kwh`` and ``co2_kg``; ``unreadable``, messages about
      ledgers that could not be read, whose cost is in no total.

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
    return {
        "runs": runs,
        "total": {
            "headline": _total(lenses.headline(runs)),
            "all_in": _total(lenses.all_in(runs)),
        },
        "unreadable": unreadable,
    }


def _total(runs: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {name: sum(run[name] for run in runs) for name in _SUMS}
    known = {name: _sum_known(run[name] for run in runs) for name in ("energy_kwh", "co2_kg")}
    return {"runs": len(runs), **sums, **known}


def format_ledger(summary: dict[str, Any]) -> str:
    """``summarize``'s result as a table for people."""
    head = ("run", "stage", "status", "devices", "wall", "device-h", "dollars", "tokens", "FLOP",
            "MFU", "goodput")  # fmt: skip
    rows = [head]
    for run in summary["runs"]:
        rows.append((
            f"{run['id']}{' *' if run['final'] else ''}", run["stage"], run["status"],
            f"{run['devices']} {run['device']}", text.duration(run["wall_seconds"]),
            *_sums_as_text(run), text.percent(run["mfu"]), text.percent(run["goodput"]),
        ))  # fmt: skip
    for label, name in (("headline *", "headline"), ("all in", "all_in")):
        total = summary["total"][name]
        count = f"{total['runs']} run{'' if total['runs'] == 1 else 's'}"
        rows.append((label, count, "", "", "", *_sums_as_text(total), "", ""))
    seconds = {name: sum(run["seconds"][name] for run in summary["runs"]) for name in PHASES}
    phases = ", ".join(f"{k} {text.duration(v)}" for k, v in seconds.items() if v)
    total = summary["total"]["all_in"]
    lines = [
        text.columns(rows, left=4),
        "",
        f"time    {phases or 'none'}",
        f"energy  {text.energy(total['energy_kwh'])}, {text.carbon(total['co2_kg'])} "
        f"({'; '.join(dict.fromkeys(run['energy_source'] for run in summary['runs']))}, all in)",
        f"prices  {'; '.join(sorted({_price(run) for run in summary['runs']}))}",
        *(f"not counted: {message}" for message in summary["unreadable"]),
    ]
    return "\n".join(lines)


def _sums_as_text(figures: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{figures['device_hours']:.3g}", text.dollars(figures["dollars"]),
        text.si(figures["tokens"]), text.si(figures["model_flops"]),
    )  # fmt: skip


def _price(run: dict[str, Any]) -> str:
    price = run["price"]
    return f"{run['device']} ${price['dollars_per_hour']:g}/h ({price['source']}, {price['date']})"
