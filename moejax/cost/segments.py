"""The lines of ``ledger.jsonl`` as segments, one for each process that worked on the run.

A segment is an ``open`` line (who, on what, at which rate, by which plan), ``charge`` lines whose
values are cumulative within the segment, so that a lost or torn line loses at most one interval,
and a ``close`` line with the final values and a status. Lines that do not parse are passed over.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil

from moejax.config import UserError
from moejax.cost import energy, owned, prices, text
from moejax.cost import hardware as chips

FILE_NAME = "ledger.jsonl"
VERSION = 1
PHASES = ("startup", "compile", "data_wait", "train", "rollout", "eval", "checkpoint", "other")
STATUSES = ("completed", "budget", "interrupted", "failed")
BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass
class Segment:
    """One process's part of a run.

    Attributes:
      header: the ``open`` line: run_id, stage, hardware, devices, price, peak_flops, final,
        region, pue, energy (what the meter says of itself), host, pid, process_start; newer ones
        boot_id, process_ticks, purchase, dollars_per_kwh and plan too.
      charge: the last whole ``charge`` or ``close`` line, empty before the first.
      closed: the status of the ``close`` line; None where there is none.
    """

    header: dict[str, Any]
    charge: dict[str, Any] = dataclasses.field(default_factory=dict)
    closed: str | None = None

    @property
    def status(self) -> str:
        """As closed, or else ``running`` while its process lives on this host, or ``killed``."""
        return self.closed or ("running" if alive(self.header) else "killed")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every phase."""
        return {name: self.charge.get("seconds", {}).get(name, 0.0) for name in PHASES}

    @property
    def device_hours(self) -> dict[str, float]:
        """Device-hours of every phase."""
        devices = self.header["devices"]
        return {name: value / 3600 * devices for name, value in self.seconds.items()}

    @property
    def rate(self) -> float:
        """Dollars of one device for one hour."""
        return self.header["price"]["dollars_per_hour"]

    def bill(self) -> dict[str, Any]:
        """The segment's own figures, JSON-ready."""
        hours = sum(self.seconds.values()) / 3600
        device_hours = hours * self.header["devices"]
        found, rollout = self.consumption(), self.charge.get("rollout", {})
        return {
            "status": self.status,
            "reason": self.charge.get("reason"),
            "started": self.header.get("time"),
            "device": self.header["hardware"],
            "devices": self.header["devices"],
            "price": self.header["price"],
            "wall_seconds": hours * 3600,
            "device_hours": device_hours,
            "dollars": device_hours * self.rate,
            "tokens": self.charge.get("tokens", 0),
            "model_flops": self.charge.get("model_flops", 0.0),
            "steps": self.charge.get("steps", 0),
            "rollout_tokens": rollout.get("tokens", 0),
            "rollout_flops": rollout.get("model_flops", 0.0),
            "dollars_owned": self.owned_dollars(device_hours, found["energy_kwh"]),
            **found,
            "co2_kg": energy.carbon_kg(found["energy_kwh"], self.header["region"]),
        }

    def owned_dollars(self, device_hours: float, kwh: float | None) -> float | None:
        """What the segment cost an owner of its devices, US dollars (``moejax.cost.owned``).

        The electricity is the segment's own, measured where it was.

        Args:
          device_hours: hours, all devices together.
          kwh: energy at the data centre's meter; None where it is not known.

        Returns:
          None where the price to buy a device, which the ``open`` line may hold, or the energy is
          not known.
        """
        header = self.header
        book = prices.purchase(header["hardware"])
        recorded = header.get("purchase")
        price = recorded["dollars"] if recorded else book and book.dollars
        if price is None or kwh is None:
            return None
        hardware = owned.hardware_dollars_per_hour(price)
        electricity = kwh * header.get("dollars_per_kwh", energy.DOLLARS_PER_KWH)
        return (hardware + owned.network_dollars_per_hour(hardware)) * device_hours + electricity

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
    with ledger_errors(path):
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
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and {"segment", "event"} <= record.keys() else None


def close_for(path: pathlib.Path, pid: int, reason: str, status: str = "failed") -> bool:
    """Closes the segments that a process of this host left open, for it; it must have ended.

    What they are charged stays what the process last wrote, at most a flush interval ago.

    Args:
      path: a ``ledger.jsonl``, or none there.
      pid: the process.
      reason: why it ended, in words; kept with the segment, also where the process closed it as
        failed without knowing why.
      status: one of STATUSES.

    Returns:
      Whether there was any.

    Raises:
      UserError: no ledger.
      OSError: it cannot be written.
    """
    mine = [
        segment
        for segment in segments(path)
        if segment.header.get("pid") == pid and segment.header.get("host") == socket.gethostname()
    ][-1:]
    mine = [segment for segment in mine if segment.closed in (None, "failed")]
    for segment in mine:
        last = {**segment.charge, "segment": segment.header["segment"], "event": "close"}
        record = {**last, "status": segment.closed or status, "reason": reason}
        with open(path, "ab") as file:  # an empty line does no harm, and a torn one ends here
            file.write(b"\n" + json.dumps(record, separators=(",", ":")).encode() + b"\n")
    return bool(mine)


def process_age() -> float:
    """Seconds since this process began.

    On Linux from the kernel's own clock, which no change of the wall clock moves; psutil's start
    time, elsewhere, is exact to about a second.
    """
    try:
        with open("/proc/self/stat") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError, ValueError):
        age = time.time() - psutil.Process().create_time()
    return max(age, 0.0)


def identify_process() -> dict[str, Any]:
    """What tells this process from any other: ``host``, ``pid``, ``process_start`` and, on Linux,
    ``boot_id`` and ``process_ticks``, which no change of the wall clock moves."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": psutil.Process().create_time(),
        **(_since_boot(os.getpid()) or {}),
    }


def _since_boot(pid: int) -> dict[str, Any] | None:
    """A process's start in clock ticks since which boot; None where the system does not say."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])
        return {"boot_id": BOOT_ID.read_text().strip(), "process_ticks": ticks}
    except (OSError, IndexError, ValueError):
        return None


def alive(header: dict[str, Any]) -> bool:
    """Whether the process that wrote an ``open`` line still runs on this host."""
    if header.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(header["pid"])
        if "process_ticks" in header:
            written = {name: header.get(name) for name in ("boot_id", "process_ticks")}
            same = _since_boot(header["pid"]) == written
        else:
            # psutil knows start times to a second: the kernel's boot time is a whole number.
            same = abs(process.create_time() - header["process_start"]) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def ledger_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns what unexpected content of a file's lines raises into one clear line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a moejax ledger ({error!r} in its lines)") from error
