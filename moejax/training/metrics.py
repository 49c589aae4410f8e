"""Metrics of a run: one JSON object per line in ``metrics.jsonl``, and TensorBoard files beside it.

The JSONL is the record that reports and notebooks read. Every line is strict JSON: a number that
is not finite is written as null. A line that a killed process left half written is dropped.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from moejax.config import UserError

# tensorboardX imports PyTorch wherever it is installed: two seconds of every start, for nothing.
_torch_is_wanted = "torch" in sys.modules
sys.modules.setdefault("torch", None)
from tensorboardX import summary  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402

if not _torch_is_wanted:
    del sys.modules["torch"]

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsError(UserError):
    """Metrics that cannot be written, or a damaged record of them; one line."""


class MetricWriter:
    """Appends metrics to a run directory. Nothing is written before the first ``write``.

    Args:
      workdir: the run directory.
      resume_step: the step that a resumed run goes on from: what was written for later steps, and
        will be written again, is dropped at the first ``write``.
      tensorboard: also write TensorBoard files: scalars, and arrays as histograms.
      on_error: takes the MetricsError of a ``write`` that failed (a full disk), so that training
        goes on. Without it, ``write`` raises.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        on_error: Callable[[MetricsError], None] | None = None,
    ):
        self._workdir = pathlib.Path(workdir)
        self._resume_step = resume_step
        self._with_tensorboard = tensorboard
        self._on_error = on_error
        self._file: Any = None
        self._board: _Board | None = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line; it is in the file, if not on the disk, when this returns.

        Args:
          step: optimizer steps done. Two lines may have the same step (training, validation).
          values: numbers, strings, None, or arrays and nested lists of numbers (the load of every
            layer and expert, say), by name; ``step`` is taken.

        Raises:
          MetricsError: the files cannot be written (a full disk); no half line is left, and the
            next ``write`` tries again.
          ValueError: a metric is called ``step``.
          TypeError: a value of another kind.
        """
        if "step" in values:
            raise ValueError("a metric cannot be called 'step'")
        row = {"step": int(step)} | {name: _plain(value) for name, value in values.items()}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        path = self._workdir / FILE
        try:
            if self._file is None:
                self._open()
            _append(self._file, line)
            path = self._workdir / TENSORBOARD
            if self._with_tensorboard:
                self._to_board(row)
        except OSError as error:
            failure = MetricsError(f"{path} cannot be written: {error.strerror or error}")
            if self._on_error is None:
                raise failure from error
            self._on_error(failure)

    def _open(self) -> None:
        self._workdir.mkdir(parents=True, exist_ok=True)
        _mend(self._workdir / FILE, self._resume_step)
        self._file = open(self._workdir / FILE, "ab", buffering=0)  # noqa: SIM115

    def _to_board(self, row: dict[str, Any]) -> None:
        try:
            if self._board is None:
                self._board = _Board(self._workdir / TENSORBOARD, self._resume_step)
            self._board.write(row)
        except OSError:
            if self._board is not None:
                self._board.close()
            self._board = None  # the next write begins another file
            raise

    def close(self) -> None:
        """Flushes and closes the files; a later ``write`` opens them again."""
        if self._file is not None:
            self._file.close()
            self._resume_step = None  # lines written since then stay
        if self._board is not None:
            self._board.close()
        self._file = self._board = None


class _Board:
    """One TensorBoard event file, written in the caller's thread.

    tensorboardX's own SummaryWriter hands events to a thread through a bounded queue: once a full
    disk has killed that thread, the training loop would wait for it for ever.
    """

    FLUSH_SECONDS = 20.0

    def __init__(self, folder: pathlib.Path, resume_step: int | None):
        folder.mkdir(exist_ok=True)
        # tensorboardX names a file by the second, and would overwrite one of the same second.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = time.monotonic()
        if resume_step is not None:  # TensorBoard hides what earlier files say from here on
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=resume_step + 1, session_log=start))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def write(self, row: dict[str, Any]) -> None:
        """Writes the numbers of one line; raises OSError."""
        for name, value in row.items():
            if name == "step" or value is None or isinstance(value, str):
                continue
            if isinstance(value, list):
                numbers = np.asarray(list(_numbers(value)), np.float64)
                if numbers.size == 0:
                    continue
                content = summary.histogram(name, numbers, bins=30)
            else:
                content = summary.scalar(name, value)
            self._write(Event(step=row["step"], summary=content))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the record that counts is the JSONL
            self._events.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, in order; none where there is no such file.

    A last line that was cut off in the middle of writing is left out.

    Raises:
      MetricsError: another line is no JSON object with a step.
    """
    path = pathlib.Path(workdir) / FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MetricsError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
        try:
            row = json.loads(line)
            good = isinstance(row, dict) and type(row.get("step")) is int
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise MetricsError(
                f"{path} is damaged: line {number} is no metrics line; delete that line"
            )
        rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    """A value as strict JSON: plain numbers, nested lists, and null for what is not finite."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if not isinstance(value, (bool, int, float)):
        array = np.asarray(value)  # numpy scalars, jax arrays
        if array.dtype.kind not in "biuf":
            array = array.astype(np.float32)  # bfloat16 and the like
        return _plain(array.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _numbers(nested: Any) -> Iterator[float]:
    """The numbers in nested lists, without nulls and text."""
    if isinstance(nested, list):
        for value in nested:
            yield from _numbers(value)
    elif isinstance(nested, (int, float)):
        yield float(nested)


def _append(file: Any, line: bytes) -> None:
    """Appends a whole line or nothing."""
    start = os.fstat(file.fileno()).st_size
    try:
        written = file.write(line)
        if written != len(line):
            raise OSError("only part of a line could be written; is the disk full?")
    except OSError:
        os.truncate(file.fileno(), start)
        raise


def _mend(path: pathlib.Path, resume_step: int | None) -> None:
    """Drops a torn last line, and lines after ``resume_step``; the file is replaced as a whole."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    kept = whole
    if resume_step is not None:
        rows = zip(read_metrics(path.parent), whole.splitlines(keepends=True), strict=True)
        kept = b"".join(line for row, line in rows if row["step"] <= resume_step)
    if kept != data:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(kept)
        os.replace(temporary, path)
