"""A run's bill while it runs: what every second of the process was spent on, and what it cost.

The ledger opens once a run's config is valid, charges the start-up before that in arrears, writes
its state to ``ledger.jsonl`` at least once a second, and is closed with a status. A process that
is killed has paid for all but the last interval, and its ledger reads as ``killed``.

Durations are by the monotonic clock; the wall clock only labels.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from moejax.cost import bill, energy, late_charges, plan_against, starting
from moejax.cost.meter import EnergyMeter
from moejax.cost.prices import Price, Purchase
from moejax.cost.segments import PHASES, STATUSES, VERSION, identify_process, process_age

__all__ = ["PHASES", "STATUSES", "Ledger"]

FLUSH_SECONDS = 0.8  # leaves a margin below the promised second

_log = logging.getLogger(__name__)
_startup_charged = False


class Ledger:
    """The open ledger of one process's work on a run; make it with ``Ledger.open``.

    As a context manager it closes itself: ``completed``, ``interrupted`` on KeyboardInterrupt and
    ``failed`` on any other exception, unless it was closed before. All methods may be called from
    any thread, but there is one current phase, that of the training loop. After closing, nothing
    is charged any more and calls are ignored.
    """

    def __init__(
        self, path: pathlib.Path, header: dict[str, Any], startup_seconds: float,
        meter: EnergyMeter | None = None, on_phase: Callable[[str], None] | None = None,
    ):  # fmt: skip
        bill.spent(path)  # raises where it is no ledger, before anything is written
        self._header = header
        self._meter = meter
        self._on_phase = on_phase
        self._rate = header["price"]["dollars_per_hour"] * header["devices"] / 3600
        self._lock = threading.RLock()
        self._file_lock = threading.RLock()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._seconds["startup"] = startup_seconds
        self._phase = "other"
        self._since = time.monotonic()
        self._tokens, self._flops, self._steps = 0, 0.0, 0
        self._rollout = {"tokens": 0, "model_flops": 0.0}
        self._began: dict[str, Any] = {}
        self._sent = {"tokens": 0, "scale_up": 0.0, "scale_out": 0.0}
        self._closed = False
        self._warned = False

        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        for line in late_charges.lines(path, header):
            self._write(line)
        self._earlier = bill.spent(path)
        self._write(self._header)
        self._flush("charge")
        starting.end()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._flush_forever, name="ledger", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        run_id: str,
        stage: str,
        hardware: str,
        devices: int,
        price: Price,
        peak_flops: float | None,
        final: bool = False,
        region: str = "world",
        plan: Mapping[str, Any] | None = None,
        exchange: Mapping[str, Any] | None = None,
        pue: float | None = None,
        meter: EnergyMeter | None = None,
        purchase: Purchase | None = None,
        dollars_per_kwh: float = energy.DOLLARS_PER_KWH,
        backfill_seconds: float | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> Self:
        """Opens a run's ledger, new or to go on with, and begins a segment in phase ``other``.

        Args:
          path: ``RUN/ledger.jsonl``; folders are made.
          run_id: name of the run in tables.
          stage: what the run is for: ``pretrain``, ``sft`` …
          hardware: a chip of ``moejax.cost.hardware``.
          devices: devices billed, of all processes; on a CPU, cores.
          price: the rate of one device.
          peak_flops: FLOP/s of all the devices together, for MFU; None where unknown.
          final: whether the run counts in the headline.
          region: whose grid the carbon is counted by.
          exchange: how tokens reach experts on other devices: ``kind``, ``expert_devices`` and
            ``devices_per_node``; None where they do not travel.
          plan: ``moejax.cost.plan.make_plan`` of the whole run, to compare its bill with.
          pue: power usage effectiveness of the data centre; None takes the chip's usual one.
          meter: measures energy, and is closed with the ledger; None leaves it to the estimate.
          purchase: what a device costs to buy, for the ``owned`` lens; None takes the packaged
            book's when the ledger is read.
          dollars_per_kwh: price of electricity, for the ``owned`` lens.
          backfill_seconds: time before this call, charged to ``startup``; None means since the
            process began for its first ledger, and nothing for any later one.
          on_phase: told each phase as it begins, in the thread that enters it.

        Raises:
          ConfigError: no such chip or region, or an impossible PUE.
          UserError: the file is no ledger, or one written by a newer moejax.
          OSError: the file cannot be written.
        """
        global _startup_charged
        energy.overhead(hardware, pue)
        energy.carbon_factor(region)
        if backfill_seconds is None:
            backfill_seconds = 0.0 if _startup_charged else process_age()
        _startup_charged = True
        header = {
            "segment": uuid.uuid4().hex[:12],
            "event": "open",
            "version": VERSION,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run_id": run_id,
            "stage": stage,
            "hardware": hardware,
            "devices": devices,
            "price": price.to_dict(),
            "peak_flops": peak_flops,
            "final": final,
            "region": region,
            "pue": pue,
            "energy": None if meter is None else meter.describe(),
            "purchase": purchase and dataclasses.asdict(purchase),
            "dollars_per_kwh": dollars_per_kwh,
            **identify_process(),
            "exchange": exchange and dict(exchange),
            "plan": plan and plan_against.record(plan),
        }
        return cls(pathlib.Path(path), header, backfill_seconds, meter, on_phase)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:  # fmt: skip
        if kind is None:
            self.close("completed")
        else:
            self.close("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the block to a phase, and what follows to the phase before it."""
        previous = self.enter(name)
        try:
            yield
        finally:
            self.enter(previous)

    def enter(self, name: str) -> str:
        """Charges the time from now on to a phase (one of PHASES); returns the phase left.

        Raises:
          ValueError: no such phase.
        """
        if name not in PHASES:
            raise ValueError(f"no phase {name!r}; known: {', '.join(PHASES)}")
        with self._lock:
            self._settle()
            previous, self._phase = self._phase, name
        if self._on_phase is not None:
            self._on_phase(name)
        return previous

    def add(self, tokens: int = 0, model_flops: float = 0.0, steps: int = 0) -> None:
        """Adds work done: tokens trained on, their model FLOPs, optimizer steps."""
        with self._lock:
            if not self._closed:
                self._tokens += tokens
                self._flops += model_flops
                self._steps += steps

    def add_rollout(self, tokens: int, model_flops: float) -> None:
        """Adds what was sampled: tokens that a sampler ran, prompts included, and their FLOPs."""
        with self._lock:
            if not self._closed:
                for name, value in zip(self._rollout, (tokens, model_flops), strict=True):
                    self._rollout[name] += value

    def add_exchange(self, tokens: int, scale_up: float, scale_out: float) -> None:
        """Adds what tokens sent to experts on other devices, in all of their training.

        Args:
          tokens: those that were counted; they may be some of those trained on.
          scale_up: bytes within a machine.
          scale_out: bytes between machines.
        """
        with self._lock:
            if not self._closed:
                for name, value in zip(self._sent, (tokens, scale_up, scale_out), strict=True):
                    self._sent[name] += value

    def begin_from(self, step: int, tokens: int) -> None:
        """Says which state this segment trains on from: what is beyond it in earlier ones is lost.

        A second call says that the segment went back: what it trained beyond that state is lost.

        Args:
          step: optimizer steps that the state has behind it; 0 for a new one.
          tokens: tokens that it has seen.
        """
        with self._lock:
            pieces = list(self._began.get("pieces", []))
            if self._began:
                done = [sum(piece[i] for piece in pieces) for i in (2, 3)]
                began = [self._began["from_step"], self._began["from_tokens"]]
                pieces.append([*began, self._steps - done[0], self._tokens - done[1]])
            self._began = {"from_step": step, "from_tokens": tokens}
            if pieces:
                self._began["pieces"] = pieces

    def close(self, status: str) -> None:
        """Writes the final charge with a status (one of STATUSES); a second call does nothing.

        Raises:
          ValueError: no such status.
          OSError: the file cannot be written.
        """
        if status not in STATUSES:
            raise ValueError(f"no status {status!r}; known: {', '.join(STATUSES)}")
        with self._lock:
            if self._closed:
                return
            self._settle()
            self._closed = True
        self._stop.set()
        self._thread.join(timeout=5.0)
        try:
            self._flush("close", status)
        finally:
            with self._file_lock:
                os.close(self._file)
            if self._meter is not None:
                self._meter.close()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, this segment."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    @property
    def wall_seconds(self) -> float:
        """Seconds so far, start-up included, this segment."""
        return sum(self.seconds.values())

    @property
    def device_hours(self) -> float:
        """Device-hours so far, this segment."""
        return self.wall_seconds / 3600 * self._header["devices"]

    @property
    def dollars(self) -> float:
        """Dollars so far, this segment."""
        return self.wall_seconds * self._rate

    @property
    def tokens(self) -> int:
        """Tokens so far, this segment."""
        return self._tokens

    @property
    def flops(self) -> float:
        """Model FLOPs so far, this segment."""
        return self._flops

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over (train seconds x peak), this segment; None before training."""
        possible = self.seconds["train"] * (self._header["peak_flops"] or 0.0)
        return self._flops / possible if possible else None

    @property
    def total_dollars(self) -> float:
        """Dollars of the run, earlier segments included, each at its own rate."""
        return self._earlier["dollars"] + self.dollars

    @property
    def total_hours(self) -> float:
        """Wall-clock hours of the run, earlier segments included."""
        return (self._earlier["wall_seconds"] + self.wall_seconds) / 3600

    @property
    def total_device_hours(self) -> float:
        """Device-hours of the run, earlier segments included."""
        return self._earlier["device_hours"] + self.device_hours

    @property
    def total_flops(self) -> float:
        """Model FLOPs of the run's training, earlier segments included, redone steps too."""
        return self._earlier["model_flops"] + self._flops

    @property
    def rollout_flops(self) -> float:
        """Model FLOPs of the run's rollouts, earlier segments included."""
        return self._earlier["rollout_flops"] + self._rollout["model_flops"]

    @property
    def total_tokens(self) -> int:
        """Tokens of the run, earlier segments included, redone steps too."""
        return self._earlier["tokens"] + self._tokens

    def _settle(self) -> None:
        """Charges the time since the last call to the current phase. Needs the lock."""
        if not self._closed:
            now = time.monotonic()
            self._seconds[self._phase] += now - self._since
            self._since = now

    def _flush_forever(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            try:
                self._flush("charge")
            except OSError as error:  # a full disk now may have room in a second
                if not self._warned:
                    _log.warning("the ledger cannot be written and will be tried again: %s", error)
                self._warned = True

    def _flush(self, event: str, status: str | None = None) -> None:
        with self._file_lock:
            measured = self._measured()  # not under the lock that the training loop waits for
            with self._lock:
                if self._closed and event == "charge":
                    return
                self._settle()
                record = {
                    "segment": self._header["segment"],
                    "event": event,
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "seconds": {k: round(v, 4) for k, v in self._seconds.items() if v},
                    "tokens": self._tokens,
                    "model_flops": self._flops,
                    "steps": self._steps,
                    **self._began,
                    **({"rollout": dict(self._rollout)} if self._rollout["tokens"] else {}),
                    **({"exchange": dict(self._sent)} if self._sent["tokens"] else {}),
                    **measured,
                }
            self._write(record if status is None else {**record, "status": status})

    def _measured(self) -> dict[str, Any]:
        """Energy measured so far, this segment: nothing where it is estimated."""
        if self._meter is None or not self._meter.devices:
            return {}
        joules, seconds = self._meter.read()
        found = {
            "energy_joules": round(joules, 3),
            "energy_seconds": round(seconds, 4),
            "energy_source": self._meter.source,
        }
        return found | ({"energy_reason": self._meter.reason} if self._meter.reason else {})

    def _write(self, record: dict[str, Any]) -> None:
        """Appends a line in one system call, on a line of its own whatever came before.

        A line torn by a kill or a full disk, another process's too, must not swallow this one. An
        empty line does no harm.
        """
        size = os.fstat(self._file).st_size
        torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        line = ("\n" if torn else "") + json.dumps(record, separators=(",", ":")) + "\n"
        data = line.encode()
        written = os.write(self._file, data)
        if written != len(data):
            raise OSError(f"wrote {written} of {len(data)} bytes of a ledger line")
