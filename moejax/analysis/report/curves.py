"""A run's ``metrics.jsonl`` at the resolution of a figure, however long it is.

The loss is taken from every line: a figure shows the mean of each stretch of steps and, behind it,
the least and the largest value, so that no spike is lost. Everything else is read from evenly
spaced lines.
"""

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from moejax.config import UserError
from moejax.training.metrics import FILE

POINTS = 240  # of a curve, and lines that are read in full
# What a loss can be drawn over: the field of metrics.jsonl, and what an axis calls it.
AXES = {
    "tokens": "training tokens",
    "model_flops": "training FLOP",
    "seconds": "device-seconds, all phases",
    "dollars": "US dollars, all phases",
}

Row = dict[str, Any]
Place = tuple[int, int]  # number of a line and where it begins


@dataclasses.dataclass(frozen=True)
class Curves:
    """What a run logged, at most ``POINTS`` stretches of steps.

    Attributes:
      steps: the last step of each stretch.
      loss: mean training loss of each, nats per token; nan where it was not finite.
      low: the least in each.
      high: the largest.
      rows: lines of training steps, evenly spaced, the first and the last among them.
      validation: lines of validations, at most ``POINTS``.
      logged: lines of training steps in all.
    """

    steps: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]
    rows: list[Row]
    validation: list[Row]
    logged: int

    def at(
        self, axis: str, steps: Sequence[float] | Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """What had been used up by some steps: tokens, FLOPs, seconds or dollars.

        Between logged steps it is interpolated; nan where it was never logged.
        """
        known = [(row["step"], row[axis]) for row in self.rows if row.get(axis) is not None]
        if not known:
            return np.full(len(steps), np.nan)
        return np.interp(steps, *np.array(known, float).T)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one field; a list by layer gives (steps, layers)."""
        found = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        if not found:
            return np.zeros(0), np.zeros(0)
        return np.array([step for step, _ in found], float), np.array(
            [value for _, value in found], float
        )


def read_curves(folder: pathlib.Path) -> Curves:
    """Reads a run's metrics; a last line that a killed process left half written is left out.

    Args:
      folder: the run directory. Without a ``metrics.jsonl`` nothing was logged.

    Raises:
      UserError: a line that is no JSON object with a step, named by its number.
    """
    path = folder / FILE
    try:
        with open(path, "rb") as file:
            return _read(path, file)
    except FileNotFoundError:
        return _read(path, io.BytesIO())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file") from None


def _read(path: pathlib.Path, file: BinaryIO) -> Curves:
    """Goes through all lines once, and back to those that are read in full."""
    training: list[Place] = []
    checks: list[Place] = []
    steps, losses, offset = [], [], 0
    for number, line in enumerate(file):
        if not line.endswith(b"\n"):
            break
        step, loss = _head(path, number, line[:-1])
        place = (number, offset)
        offset += len(line)
        if loss is None:
            checks.append(place)
        else:
            training.append(place)
            steps.append(step)
            losses.append(loss)
    parsed = [_at(path, file, place) for place in _spread(checks)]
    return Curves(
        *_stretches(np.array(steps, float), np.array(losses, float)),
        rows=[_at(path, file, place) for place in _spread(training)],
        validation=[row for row in parsed if "val_loss" in row],
        logged=len(training),
    )


def _at(path: pathlib.Path, file: BinaryIO, place: Place) -> Row:
    number, offset = place
    file.seek(offset)
    return _whole(path, number, file.readline())


def _head(path: pathlib.Path, number: int, line: bytes) -> tuple[float, float | None]:
    """Step and loss of a line without reading it all; None is no training step's line."""
    if not (line.startswith(b'{"step": ') and line.endswith(b"}")):
        row = _whole(path, number, line)
        loss = row.get("loss", ...)
        return row["step"], None if loss is ... else math.nan if loss is None else float(loss)
    try:
        step = int(line[9 : line.index(b",", 9)])
        start = line.find(b'"loss": ', 9, 64)
        if start < 0:
            return step, None
        ends = line.find(b",", start)
        word = line[start + 8 : ends if ends > 0 else -1]
        return step, math.nan if word == b"null" else float(word)
    except ValueError:
        row = _whole(path, number, line)
        loss = row.get("loss")
        return row["step"], None if loss is None else float(loss)


def _whole(path: pathlib.Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
        if not isinstance(row["step"], int):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}, line {number + 1}: is no JSON object with a step; restore the file"
        ) from None
    return row


def _spread(numbers: Sequence[Place]) -> list[Place]:
    """At most ``POINTS`` of them, evenly spaced, the first and the last among them."""
    if len(numbers) <= POINTS:
        return list(numbers)
    places = np.linspace(0, len(numbers) - 1, POINTS).round().astype(int)
    return [numbers[i] for i in places]


def _stretches(steps: np.ndarray, losses: np.ndarray) -> Iterator[np.ndarray]:
    """Last step, mean, least and largest loss of up to ``POINTS`` stretches."""
    if not len(steps):
        return iter([np.zeros(0)] * 4)
    starts = np.unique(np.linspace(0, len(steps), min(POINTS, len(steps)) + 1).astype(int)[:-1])
    ends = np.append(starts[1:], len(steps))
    known = np.isfinite(losses)
    sums = np.add.reduceat(np.where(known, losses, 0.0), starts)
    counts = np.add.reduceat(known.astype(float), starts)
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    low = np.minimum.reduceat(np.where(known, losses, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, losses, -np.inf), starts)
    gap = counts == 0
    low[gap] = high[gap] = np.nan
    return iter([steps[ends - 1], mean, low, high])
