"""What a process spends before its ledger opens, kept beside the ledger until it does.

A start takes seconds: Python's packages, the text, the devices. A process that is killed there has
no segment yet, so a small file in the run's folder says how long it lived; the next ledger that
opens there charges it. Standard library only: it begins before anything slow is imported.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
from typing import Any

SECONDS = 0.5
MOST_SECONDS = 24 * 3600.0  # no start takes a day
LEDGER = "ledger.jsonl"

_own: "_Beat | None" = None


def begin(workdir: str | os.PathLike[str]) -> None:
    """Begins to keep this process's age in a run's folder; nothing without a run's ledger there, or
    where the system does not tell when a process began."""
    global _own
    end()
    folder = pathlib.Path(workdir).absolute()
    with contextlib.suppress(OSError, IndexError, ValueError):
        if (folder / LEDGER).is_file():
            _own = _Beat(folder)


def end() -> None:
    """Ends what ``begin`` began: the ledger charges the process now, or nothing does."""
    global _own
    if _own is not None:
        _own.end()
    _own = None


def left_behind(folder: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """Files of processes that have ended, or may have: each with ``pid``, ``process_ticks``,
    ``boot_id``, ``host``, ``process_start`` and ``seconds``; a damaged file is passed over."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob(".starting-*")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
                record = json.loads(path.read_text())
                named = f".starting-{record['pid']:d}-{record['process_ticks']:d}" == path.name
                if named and 0 <= record["seconds"] < MOST_SECONDS:
                    found.append((path, record))
    return found


class _Beat:
    """Writes the age of this process into a file until it is told to end."""

    def __init__(self, folder: pathlib.Path):
        stat = pathlib.Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])
        self._started = ticks / os.sysconf("SC_CLK_TCK")
        self._record = {
            "pid": os.getpid(),
            "process_ticks": ticks,
            "boot_id": pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "host": socket.gethostname(),
            "process_start": time.time() - self._age(),
        }
        self._path = folder / f".starting-{os.getpid()}-{ticks}"
        self._write()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="starting", daemon=True)
        self._thread.start()

    def _age(self) -> float:
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - self._started, 0.0)

    def _write(self) -> None:
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps({**self._record, "seconds": round(self._age(), 3)}))
        os.replace(temporary, self._path)

    def _beat(self) -> None:
        while not self._stop.wait(SECONDS):
            with contextlib.suppress(OSError):
                self._write()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
