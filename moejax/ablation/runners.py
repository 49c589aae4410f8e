"""How cells run: one after another in this process, or side by side in processes of their own."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

from moejax.ablation import calibrate, grid, upcycled
from moejax.ablation.grid import Cell
from moejax.ablation.record import Folder
from moejax.ablation.shares import Share, within
from moejax.ablation.spec import AblationSpec, from_dict
from moejax.analysis.ablation_record import ABLATION, PLAN
from moejax.config import UserError
from moejax.host_memory import keep_freed_memory
from moejax.training.fork import fork_run
from moejax.training.loop import Interrupted, RunFailed
from moejax.training.programs import ProgramCache
from moejax.training.train import train

STOP_SECONDS = 120.0  # for a child to end its step and save
POLL_SECONDS = 0.05
PARENT = "MOEJAX_ABLATION_PROCESS"  # environment variable: who waits for a child
INTERRUPTED = 3  # exit status of a child that was asked to stop


def execute(
    folder: Folder,
    spec: AblationSpec,
    cell: Cell,
    *,
    bill_process: bool,
    programs: ProgramCache | None = None,
) -> str | None:
    """Runs a cell, or goes on with it; what it says goes to its log.

    Args:
      folder, spec: the ablation's.
      cell: which.
      bill_process: charge the time since this process began to it.
      programs: where cells of this process find one another's compiled programs.

    Returns:
      Why it failed, in one line; None where it is complete.

    Raises:
      Interrupted: it was asked to stop; it can go on.
    """
    path, begun = folder.run(cell.id), time.monotonic()
    with folder.logged(cell.id):
        try:
            if cell.upcycled:
                config = upcycled.begin(folder, spec, cell)
            else:
                if cell.from_step and not path.exists():
                    _fork(folder, cell)
                config = grid.cell_config(spec, cell)
            summary = train(
                config, str(path), bill_process=bill_process, begun=begun, programs=programs
            )
        except Interrupted:
            raise
        except (RunFailed, UserError) as error:
            return str(error)
        except Exception as error:  # whatever it is, the other cells go on
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            return f"{type(error).__name__}: {first}"
    status = summary["status"]
    if status == "interrupted":
        raise Interrupted("asked to stop")
    return None if status == "completed" else f"ended with status {status!r}"


def _fork(folder: Folder, cell: Cell) -> None:
    """Makes a branch's run directory from its trunk's checkpoint."""
    try:
        fork_run(folder.run(cell.trunk), folder.run(cell.id), cell.steps, cell.from_step)
    except UserError as error:
        raise RunFailed(f"it cannot leave its trunk {cell.trunk}, which failed: {error}") from None


class Runner(Protocol):
    """Starts cells and says how they ended."""

    room: int

    def start(self, cell: Cell) -> None:
        """Begins a cell; only while there is ``room``."""

    def wait(self) -> tuple[Cell, str | None]:
        """The next cell that ended, and why it failed; raises Interrupted."""

    def close(self) -> None:
        """Stops what still runs."""


class InProcess:
    """Runs cells one after another here; those of a variant share its compiled programs.

    Args:
      folder, spec: the ablation's.
      bill_process: charge the time since this process began to the first cell.
    """

    def __init__(self, folder: Folder, spec: AblationSpec, bill_process: bool):
        self._folder, self._spec, self._bill_process = folder, spec, bill_process
        self._programs = ProgramCache()
        self._cell: Cell | None = None

    @property
    def room(self) -> int:
        return int(self._cell is None)

    def start(self, cell: Cell) -> None:
        self._cell = cell

    def wait(self) -> tuple[Cell, str | None]:
        cell, self._cell = self._cell, None
        error = execute(
            self._folder, self._spec, cell, bill_process=self._bill_process,
            programs=self._programs,
        )  # fmt: skip
        self._bill_process = False
        return cell, error

    def close(self) -> None:
        """Nothing runs between calls."""


@dataclasses.dataclass(frozen=True)
class Nursery:
    """What child processes begin with.

    Attributes:
      folder: the ablation's, held by this process; children hold it too, until they end.
      environment: variables of a child, before its share's.
    """

    folder: Folder
    environment: Mapping[str, str]

    def spawn(self, share: Share, what: str, name: str) -> subprocess.Popen:
        """Starts a child on its share: ``what`` is ``cell`` or ``calibrate``, ``name`` of which."""
        command = [sys.executable, "-m", "moejax.ablation.child", str(self.folder.path), what, name]
        log = name if what == "cell" else calibrate.run_name(name)
        own = {**self.environment, **share.environment(), PARENT: str(os.getpid())}
        # A child inherits this process's cores, and they bind all of its threads from the first.
        with open(self.folder.log(log), "a") as file, within(share):
            # A session of its own: Ctrl-C asks this process, which asks the children in turn.
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, start_new_session=True,
                pass_fds=[self.folder.lock_file.fileno()], env=own,
            )  # fmt: skip

    def calibrate(self, share: Share, variant: str) -> dict[str, Any]:
        """Measures a variant's step in a child.

        Raises:
          RunFailed, Interrupted: see ``moejax.ablation.calibrate.calibrate``.
        """
        process = self.spawn(share, "calibrate", variant)
        try:
            process.wait()
            answer = _answer(process)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if answer["error"] is not None:
            raise RunFailed(answer["error"])
        return answer["found"]


class Children:
    """Runs each cell in a process of its own, on its share of the machine.

    Args:
      nursery: where children begin.
      shares: as many cells run at once.
    """

    def __init__(self, nursery: Nursery, shares: Sequence[Share]):
        self._nursery, self._free = nursery, list(shares)
        self._running: dict[str, tuple[Cell, Share, subprocess.Popen]] = {}
        self._stop: str | None = None
        with contextlib.suppress(ValueError):  # only the main thread may
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT,
                                                                      signal.SIGTERM)}  # fmt: skip

    @property
    def room(self) -> int:
        return len(self._free)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._stop = signal.Signals(number).name

    def start(self, cell: Cell) -> None:
        share = self._free.pop(0)
        self._running[cell.id] = (cell, share, self._nursery.spawn(share, "cell", cell.id))

    def wait(self) -> tuple[Cell, str | None]:
        """The next cell to end, and why it failed, if it did; raises Interrupted on a signal."""
        while True:
            if self._stop is not None:
                raise Interrupted(self._stop)
            for cell, share, process in self._running.values():
                if process.poll() is not None:
                    del self._running[cell.id]
                    self._free.append(share)
                    return cell, _answer(process)["error"]
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Asks children to end their step and save, and waits for that."""
        for _, _, process in self._running.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for _, _, process in self._running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)


def _answer(process: subprocess.Popen) -> dict[str, Any]:
    """What a child that ended says: ``error``, and ``found`` where something was measured.

    Raises:
      Interrupted: it was asked to stop.
    """
    said = process.stdout.read()
    process.stdout.close()
    code = process.returncode
    if code == INTERRUPTED:
        raise Interrupted("a cell's process was asked to stop")
    try:
        answer = json.loads(said.splitlines()[-1])
        return {"error": answer["error"], "found": answer.get("found")}
    except (IndexError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; was there too little memory?" if name == "SIGKILL" else ""
        return {"error": f"its process was killed by {name}{hint}"}
    return {"error": f"its process ended with status {code}; its log says why"}


def child(workdir: str, what: str, name: str) -> int:
    """What a child process does: a cell of the ablation in ``workdir``, or a variant's seconds."""
    keep_freed_memory()
    _end_with_parent(int(os.environ[PARENT]))
    folder = Folder(workdir)
    spec = from_dict(folder.read(ABLATION)["spec"])
    answer: dict[str, Any] = {"error": None}
    try:
        if what == "calibrate":
            answer["found"] = calibrate.calibrate(folder, spec, name, bill_process=True)
        else:
            cells = map(Cell.from_dict, folder.read(PLAN)["cells"])
            cell = next(cell for cell in cells if cell.id == name)
            answer["error"] = execute(folder, spec, cell, bill_process=True)
    except Interrupted:
        return INTERRUPTED
    except (RunFailed, UserError) as error:
        answer["error"] = str(error)
    print(json.dumps(answer), flush=True)
    return 0 if answer["error"] is None else 1


def _end_with_parent(parent: int) -> None:
    """Ends this process once its parent is gone, for nobody else would."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
