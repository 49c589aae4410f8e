"""Signs of life of a process, for ``moejax launch`` to read: a small file that two hands write.

A thread writes that the process runs at all (a stopped one does not); the training loop writes that
it gets on, and by when it expects to say so again. Where nobody asks for it, nothing is written.
"""

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

FILE = "MOEJAX_HEARTBEAT"  # environment: the file to write
STALL = "MOEJAX_STALL_SECONDS"  # environment: what a step may take before it counts as stuck
PULSE_SECONDS = 1.0
# What may take long, in one call: compilation, a save to slow storage, a pass over held-out text.
LONG = {"startup": 1800.0, "compile": 1800.0, "other": 1800.0, "eval": 1800.0, "checkpoint": 1800.0}
FIRST_PHASES = 8  # phases of the first steps, which may wait for what was dispatched before them
SLOW = 10.0  # times the longest phase so far


class Signs(NamedTuple):
    """What a process last said, in seconds of the machine's monotonic clock.

    Attributes:
      pulse: when its thread last ran.
      progress: when its loop last got on.
      allowed: how long it may take to get on again.
      phase: what it is doing since.
    """

    pulse: float
    progress: float
    allowed: float
    phase: str


class Heartbeat:
    """Writes the signs of this process.

    Args:
      path: the file.
      stall_seconds: what a phase of a step may take; longer ones so far raise it.
    """

    def __init__(self, path: pathlib.Path, stall_seconds: float):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._stall, self._longest, self._steps = stall_seconds, 0.0, 0
        self._progress, self._allowed, self._phase = time.monotonic(), LONG["startup"], "startup"
        self._lock = threading.Lock()
        self._write()
        threading.Thread(target=self._pulse, name="heartbeat", daemon=True).start()

    def beat(self, phase: str) -> None:
        """Says that the loop has got on, to this phase (one of ``moejax.cost.ledger.PHASES``)."""
        now = time.monotonic()
        with self._lock:
            if self._phase not in LONG and self._steps > FIRST_PHASES:
                self._longest = max(self._longest, now - self._progress)
            if phase not in LONG:
                self._steps += 1
            early = self._steps <= FIRST_PHASES
            usual = LONG["compile"] if early else max(self._stall, SLOW * self._longest)
            self._progress, self._phase = now, phase
            self._allowed = LONG.get(phase, usual)
            self._write()

    def _pulse(self) -> None:
        while True:
            time.sleep(PULSE_SECONDS)
            with self._lock:
                self._write()

    def _write(self) -> None:
        """One line of fixed length in one system call. Needs the lock."""
        now = time.monotonic()
        line = f"{now:.3f} {self._progress:.3f} {self._allowed:.1f} {self._phase}".ljust(79)
        with contextlib.suppress(OSError):  # a full disk must not end the run
            os.pwrite(self._file, line.encode() + b"\n", 0)


def read(path: pathlib.Path) -> Signs | None:
    """What a process last said; None before it said anything."""
    try:
        pulse, progress, allowed, phase = path.read_text().split()
        return Signs(float(pulse), float(progress), float(allowed), phase)
    except (OSError, ValueError):
        return None


_own: Heartbeat | None = None


def begin() -> None:
    """Begins to give signs, where a launcher asks for them."""
    global _own
    if _own is None and os.environ.get(FILE):
        _own = Heartbeat(pathlib.Path(os.environ[FILE]), float(os.environ.get(STALL, "60")))


def beats() -> Callable[[str], None] | None:
    """What to tell each phase of the loop; None where nobody asks."""
    return None if _own is None else _own.beat
