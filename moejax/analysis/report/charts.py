"""What figures show; ``svg`` draws them in the page, ``files`` beside it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
      label: its name in the legend; empty for none.
      x: where.
      y: how much; nan breaks the curve.
      band: lower and upper edge of an area behind it.
      colour: number of its colour; the same in all figures of a report.
      style: ``line``, ``dashed`` or ``points``, which are joined by a thin line.
    """

    label: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    band: tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]] | None = None
    colour: int = 0
    style: Literal["line", "dashed", "points"] = "line"


@dataclasses.dataclass(frozen=True)
class Chart:
    """What all figures have.

    Attributes:
      name: of its file and its anchor.
      title: heading.
      caption: what one sees, and what bands and colours mean.
    """

    name: str
    title: str
    caption: str


@dataclasses.dataclass(frozen=True)
class LineChart(Chart):
    """Curves over one axis.

    Attributes:
      x_label: of the axis, with its unit.
      y_label: likewise.
      lines: the curves.
      references: horizontal lines with their names.
      zero: the y axis begins at zero.
      log_x: logarithmic x axis.
      cut_start: the y axis need not show the first twentieth of the x axis.
      money: x is in dollars.
      whole: x is counted: no ticks between whole numbers.
    """

    x_label: str
    y_label: str
    lines: Sequence[Line]
    references: Sequence[tuple[str, float]] = ()
    zero: bool = False
    log_x: bool = False
    cut_start: bool = False
    money: bool = False
    whole: bool = False

    @property
    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Least and largest x and y to show; 0 to 1 where there is nothing."""
        xs = np.concatenate([line.x for line in self.lines] or [np.zeros(0)]).astype(float)
        finite = np.isfinite(xs) & ((xs > 0) | (not self.log_x))
        x_low, x_high = _extent(xs[finite])
        start = x_low + (x_high - x_low) / 20 if self.cut_start else -math.inf
        ys = [np.array([value for _, value in self.references], float)]
        for line in self.lines:
            known = np.isfinite(line.y)
            shown = known & (line.x >= start)
            shown = shown if shown.any() else known
            ys.append(line.y[shown])
            ys += [edge[shown] for edge in line.band or ()]
        heights = np.concatenate(ys)
        y_low, y_high = _extent(heights[np.isfinite(heights)])
        room = 0.04 * (y_high - y_low)
        y_low = 0.0 if self.zero and y_low >= 0 else y_low - room
        return (x_low, x_high), (y_low, y_high + room)

    @property
    def cuts(self) -> bool:
        """Whether the axis leaves out values of the start."""
        _, (_, top) = self.limits
        return self.cut_start and any(np.nanmax(line.y, initial=-math.inf) > top
                                      for line in self.lines)  # fmt: skip


def _extent(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if high > low:
        return low, high
    half = abs(low) / 10 or 0.5
    return low - half, high + half


@dataclasses.dataclass(frozen=True)
class HeatMap(Chart):
    """A matrix as colours.

    Attributes:
      values: rows from the top; nan stays empty.
      rows: names of the rows; those that fit are written.
      columns: names of the columns, likewise; or places from 0 to 1 along the axis, with names.
      x_label: what the columns are.
      y_label: what the rows are.
      scale: ``diverging`` sets what is above 1 off from what is below; ``sequential`` goes from 0.
      top: the value that has the full colour; larger ones have it too.
    """

    values: Float[np.ndarray, "rows columns"]
    rows: Sequence[str]
    columns: Sequence[str] | Sequence[tuple[float, str]]
    x_label: str
    y_label: str
    scale: Literal["diverging", "sequential"]
    top: float

    def column_ticks(self, room: float) -> list[tuple[float, str]]:
        """Places from 0 to 1 along the x axis and what is written there.

        Args:
          room: characters that fit beside one another.
        """
        if self.columns and isinstance(self.columns[0], tuple):
            return list(self.columns)
        longest = max((len(name) for name in self.columns), default=1)
        return [
            ((j + 0.5) / len(self.columns), self.columns[j])
            for j in some(len(self.columns), room / (longest + 2))
        ]


def some(number: int, fit: float) -> list[int]:
    """Evenly spaced indices of so many, as many as fit."""
    return list(range(0, number, -(-number // max(int(fit), 1))))


@dataclasses.dataclass(frozen=True)
class Interval:
    """One row of a ``Forest``: an estimate and its interval.

    Attributes:
      label: of the row.
      value: the estimate; nan where there is none.
      low: lower end; infinite where it is open.
      high: upper end.
      kind: ``good``, ``bad``, ``unsure`` or ``plain``.
      text: written at the right.
    """

    label: str
    value: float
    low: float
    high: float
    kind: str = "plain"
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Forest(Chart):
    """Estimates with intervals, one below the other, beside a line of no difference.

    Attributes:
      rows: from the top.
      x_label: of the axis, with its unit.
      zero: where there is no difference.
      margin: differences smaller than this, on either side, do not matter; shaded.
      log: logarithmic axis, of ratios.
    """

    rows: Sequence[Interval]
    x_label: str
    zero: float = 0.0
    margin: float = 0.0
    log: bool = False


def ticks(
    low: float, high: float, count: int = 5, log: bool = False, whole: bool = False
) -> list[float]:
    """About ``count`` round numbers within an axis: 1, 2 or 5 times a power of ten apart."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for factors in ((1,), (1, 2, 5)):
            found = [f * 10.0**e for e in range(first, last + 1) for f in factors]
            found = [value for value in found if low <= value * (1 + 1e-9) and value <= high]
            if len(found) >= 3:
                return found[:: -(-len(found) // 6)]
        # Less than a decade: as on an even axis.
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = min((f * size for f in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def tick_label(value: float, spacing: float, money: bool = False) -> str:
    """A tick as text, with as many digits as tell it from its neighbours."""
    size, prefix = 1.0, ""
    largest = abs(value)
    for candidate, name in _PREFIXES:
        if largest >= candidate * 0.9999:
            size, prefix = candidate, name
            break
    digits = max(0, min(12, -math.floor(math.log10(abs(spacing) / size) + 1e-9)))
    text = f"{value / size:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value / size:.0f}"
    if largest and (abs(value) < 1e-4):
        text = f"{value:.2g}".replace("e-0", "e-")
    text = "0" if text in ("-0", "") else text
    return f"{'-' if text.startswith('-') else ''}{'$' if money else ''}{text.lstrip('-')}{prefix}"
