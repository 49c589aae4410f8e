"""A watch over processes that are one job: they live together, or none does.

A peer that died or stands still leaves the others waiting in a collective, or aborted by jax in
C++ without a word on the cause. Whoever started them can see which one it was.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

import psutil

from moejax.launch.child import PARENT
from moejax.launch.shares import Share
from moejax.parallel import heartbeat

POLL_SECONDS = 0.1
STOPPED_SECONDS = 15.0  # stopped (SIGSTOP), or without a pulse
SETTLE_SECONDS = 1.0  # what dies of the same cause dies within it
FAREWELL_SECONDS = 20.0  # for the others, where one ended by itself
# What survivors are ended by once a peer has gone: seldom the cause.
CONSEQUENCES = (-signal.SIGABRT, 128 + signal.SIGABRT, 1)
USER_ERROR = 2
# Gloo tells that peers have met, in pieces that other threads' lines may part.
_GREETING = re.compile(r"\[Gloo\] Rank|\d* ?is connected to \d+ peer ranks")


@dataclasses.dataclass
class Child:
    """A process of the job: its number, itself, its signs of life, when its end was seen."""

    number: int
    process: subprocess.Popen
    signs: pathlib.Path
    ended: float | None = None
    stopped: float | None = None

    def status(self) -> int | None:
        """Its exit status, below zero for a signal; None while it runs."""
        code = self.process.poll()
        if code is not None and self.ended is None:
            self.ended = time.monotonic()
        return code


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
      status: the exit status for the launcher.
      culprit: the number of the process that took it down; None for none.
      pid: its process id.
      reason: what happened to it, in words; empty for nothing.
    """

    status: int
    culprit: int | None = None
    pid: int | None = None
    reason: str = ""


class Supervisor:
    """Starts processes and waits for their end; as a context it leaves none behind.

    Args:
      commands: a command line for each process.
      shares: what each may use.
      folder: for their signs of life.
      stall_seconds: what a step may take, see ``moejax.parallel.heartbeat``.
      environment: variables for all of them, beside their share's.
      write: takes each line that they print to standard error, with their number before it.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        shares: Sequence[Share],
        folder: pathlib.Path,
        *,
        stall_seconds: float,
        environment: Mapping[str, str] = os.environ,
        write: Callable[[str], None] | None = None,
    ):
        self._commands, self._shares, self._folder = commands, shares, folder
        self._stall, self._environment = stall_seconds, environment
        self._write = write or _to_standard_error
        self.children: list[Child] = []
        self._readers: list[threading.Thread] = []
        self._asked: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Supervisor":
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._forward)
        for number, (command, share) in enumerate(zip(self._commands, self._shares, strict=True)):
            self.children.append(self._spawn(number, command, share))
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _spawn(self, number: int, command: Sequence[str], share: Share) -> Child:
        signs = self._folder / f"{number}.signs"
        own = {
            **self._environment, **share.environment, PARENT: str(os.getpid()),
            heartbeat.FILE: str(signs), heartbeat.STALL: str(self._stall),
        }  # fmt: skip
        # Process 0's standard output is the job's, for --format=json.
        output = None if number == 0 else subprocess.DEVNULL
        with _pinned(share.cores):
            # A session of its own: Ctrl-C reaches this process, which forwards it once.
            process = subprocess.Popen(
                command, env=own, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE,
                start_new_session=True, text=True, errors="replace", bufsize=1,
            )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(number, process), daemon=True)
        reader.start()
        self._readers.append(reader)
        return Child(number, process, signs)

    def _read(self, number: int, process: subprocess.Popen) -> None:
        for line in process.stderr:
            if _GREETING.match(line):
                continue
            self._write(f"[{number}] {line.rstrip()}\n")

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on to all; a third one kills them."""
        del frame
        self._asked.append(number)
        for child in self.children:
            if child.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    if len(self._asked) > 2:
                        child.process.kill()
                    else:
                        child.process.send_signal(number)

    def wait(self) -> Outcome:
        """Waits until all have ended well, or one has not: then the others are killed."""
        while True:
            codes = [child.status() for child in self.children]
            if all(code == 0 for code in codes):
                self._drain()
                return Outcome(0)
            if any(code not in (None, 0) for code in codes):
                return self._ended_badly()
            stalled = self._stalled()
            if stalled is not None:
                child, reason = stalled
                self.kill()
                return Outcome(1, child.number, child.process.pid, reason)
            time.sleep(POLL_SECONDS)

    def _ended_badly(self) -> Outcome:
        """Lets the others follow, and finds the cause."""
        first = [child for child in self.children if child.status() not in (None, 0)]
        # What stands still is the cause, whoever was aborted for it.
        suspects = [
            child for child in self.children if self._still(child, heartbeat.PULSE_SECONDS * 4)
        ]
        by_itself = all(child.status() in (1, USER_ERROR) for child in first) and not suspects
        deadline = time.monotonic() + (FAREWELL_SECONDS if by_itself else SETTLE_SECONDS)
        while time.monotonic() < deadline and None in [c.status() for c in self.children]:
            time.sleep(POLL_SECONDS)
        codes = [child.status() for child in self.children]
        failed = [child for child in self.children if child.status() not in (None, 0)]
        self.kill()
        ended_alike = by_itself and all(code in (0, first[0].process.returncode) for code in codes)
        if ended_alike:  # they have said themselves what it was
            return Outcome(first[0].process.returncode)
        if suspects:
            return Outcome(
                1, suspects[0].number, suspects[0].process.pid, "stopped or without a pulse"
            )
        unlike = [c for c in failed if c.process.returncode not in CONSEQUENCES and c.ended]
        culprit = min(unlike or first, key=lambda child: child.ended or 0.0)
        status = USER_ERROR if culprit.process.returncode == USER_ERROR else 1
        return Outcome(status, culprit.number, culprit.process.pid, how(culprit.process.returncode))

    def _still(self, child: Child, seconds: float) -> bool:
        """Whether a process is stopped, or has not had a pulse for so long."""
        if child.process.poll() is not None:
            return False
        if self._stopped(child):
            return True
        signs = heartbeat.read(child.signs)
        return signs is not None and time.monotonic() - signs.pulse > seconds

    def _stopped(self, child: Child) -> bool:
        """Whether a signal has stopped a process."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(child.process.pid).status() == psutil.STATUS_STOPPED
        return False

    def _stalled(self) -> tuple[Child, str] | None:
        """The process that stands still, and for how long; the one furthest behind if several."""
        now, stuck = time.monotonic(), []
        for child in self.children:
            if child.status() is not None:
                continue
            if not self._still(child, STOPPED_SECONDS):
                child.stopped = None
            elif child.stopped is None:
                child.stopped = now
            signs = heartbeat.read(child.signs)
            quiet = now - signs.pulse if signs else 0.0
            since = max(now - child.stopped, quiet) if child.stopped is not None else 0.0
            if since > STOPPED_SECONDS:
                what = "stopped" if self._stopped(child) else "without a sign of life"
                return child, f"{what} for {since:.0f} s"
            if signs and now - signs.progress > signs.allowed:
                stuck.append((signs.progress, child, signs))
        if not stuck or any(child.stopped is not None for child in self.children):
            return None
        progress, child, signs = min(stuck, key=lambda found: found[0])
        return child, f"stuck for {now - progress:.0f} s in phase {signs.phase!r}"

    def kill(self) -> None:
        """Ends what is left."""
        for child in self.children:
            if child.status() is None:
                child.process.kill()
        for child in self.children:
            child.process.wait()
            child.status()
        self._drain()

    def _drain(self) -> None:
        for reader in self._readers:
            reader.join(timeout=2.0)


def how(code: int) -> str:
    """An exit status in words."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (too little memory?)" if name == "SIGKILL" else "")
    return f"exit status {code}"


def describe(outcome: Outcome) -> str:
    """Which process took the job down, and how, in a line."""
    return (
        f"process {outcome.culprit} on {socket.gethostname()} (pid {outcome.pid}) "
        f"{_verb(outcome.reason)}; the others were ended"
    )


def _verb(reason: str) -> str:
    return f"ended with {reason}" if reason.startswith("exit") else f"was {reason}"


@contextlib.contextmanager
def _pinned(cores: Sequence[int]):
    """Keeps this process to some cores while it starts another, which inherits them."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _to_standard_error(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()
