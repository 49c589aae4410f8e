"""Figures of a report as files: the same charts, drawn by matplotlib for papers and slides."""

import math
import pathlib
from collections.abc import Iterable, Sequence

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter

from moejax.analysis import figures
from moejax.analysis.curves import save_figure
from moejax.analysis.report.charts import Chart, Forest, HeatMap, LineChart, some, tick_label, ticks
from moejax.analysis.report.style import LIGHT
from moejax.analysis.report.svg import COLOURS, paint

KINDS = ("png", "svg")
DOTS_PER_INCH = 160


def draw(charts: Iterable[Chart], folder: pathlib.Path, kinds: Sequence[str]) -> list[pathlib.Path]:
    """Writes every figure as files of the kinds wanted; the same figure gives the same file.

    Args:
      charts: of a report.
      folder: where; it is made.
      kinds: of ``KINDS``.

    Raises:
      OSError: a file cannot be written.
    """
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        for kind in kinds:
            made = {LineChart: _line_chart, HeatMap: _heat_map, Forest: _forest}[type(chart)](chart)
            written.append(save_figure(made, folder / f"{chart.name}.{kind}"))
    return written


def _figure(chart: Chart, height: float) -> tuple[plt.Figure, plt.Axes]:
    made, axes = plt.subplots(figsize=(5.2, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes.set_title(plain(chart.title), fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def plain(label: str, most: int = 60) -> str:
    """A label without mathematics and, since a figure has only so much room, not too long."""
    return figures.plain(label if len(label) <= most else f"{label[: most - 1]}…")


def _colour(number: int) -> str:
    return LIGHT[f"c{number % COLOURS}"]


def _line_chart(chart: LineChart) -> plt.Figure:
    made, axes = _figure(chart, 3.3)
    across, up = chart.limits
    for line in chart.lines:
        style = {"line": "-", "dashed": "--", "points": "o-"}[line.style]
        axes.plot(line.x, line.y, style, color=_colour(line.colour), linewidth=1.2, markersize=3.5,
                  label=plain(line.label, 40) or None)  # fmt: skip
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=_colour(line.colour), alpha=0.2,
                              linewidth=0)  # fmt: skip
    for label, value in chart.references:
        axes.axhline(value, color=LIGHT["muted"], linestyle=":", linewidth=1)
        axes.annotate(plain(label), (1, value), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize="x-small", color=LIGHT["muted"])  # fmt: skip
    if chart.log_x:
        axes.set_xscale("log")
    axes.set_xlim(*across)
    axes.set_ylim(*up)
    found = ticks(*across, 4, chart.log_x, chart.whole)
    gap = found[1] - found[0] if len(found) > 1 else 1.0
    axes.xaxis.set_major_locator(FixedLocator(found))
    name = lambda value, _: plain(
        tick_label(value, value if chart.log_x else gap, money=chart.money)
    )
    axes.xaxis.set_major_formatter(FuncFormatter(name))
    axes.set_xlabel(plain(chart.x_label))
    axes.set_ylabel(plain(chart.y_label))
    axes.grid(alpha=0.25)
    if sum(bool(line.label) for line in chart.lines) > 1:
        axes.legend(frameon=False, fontsize="x-small")
    return made


def _heat_map(chart: HeatMap) -> plt.Figure:
    rows, columns = chart.values.shape
    made, axes = _figure(chart, 1.3 + min(max(0.16 * rows, 0.5), 3.5))
    axes.imshow(paint(chart.values, chart.scale, chart.top), aspect="auto", interpolation="nearest")
    axes.set_yticks(some(rows, 16), [plain(chart.rows[i], 16) for i in some(rows, 16)],
                    fontsize="x-small")  # fmt: skip
    at = chart.column_ticks(50)
    axes.set_xticks([place * columns - 0.5 for place, _ in at], [plain(name, 16) for _, name in at],
                    fontsize="x-small")  # fmt: skip
    axes.set_xlabel(plain(chart.x_label))
    axes.set_ylabel(plain(chart.y_label))
    shades = np.linspace(0, 1, 256)[None] * chart.top
    colours = paint(shades, chart.scale, chart.top)[0] / 255
    white = colours[:, :3] * colours[:, 3:] + 1 - colours[:, 3:]
    scale = plt.cm.ScalarMappable(
        norm=matplotlib.colors.Normalize(0, chart.top),
        cmap=matplotlib.colors.ListedColormap(white),
    )
    made.colorbar(scale, ax=axes, extend="max" if chart.scale == "diverging" else "neither")
    return made


def _forest(chart: Forest) -> plt.Figure:
    made, axes = _figure(chart, 1.1 + 0.34 * len(chart.rows))
    colours = {"good": LIGHT["good"], "bad": LIGHT["bad"], "unsure": LIGHT["unsure"]}
    if chart.margin:
        axes.axvspan(chart.zero - chart.margin, chart.zero + chart.margin, color=LIGHT["panel"])
    axes.axvline(chart.zero, color=LIGHT["text"], linewidth=0.8)
    for i, row in enumerate(chart.rows):
        colour = colours.get(row.kind, _colour(0))
        if not math.isfinite(row.value):
            continue
        ends = [v if math.isfinite(v) else row.value for v in (row.low, row.high)]
        axes.plot(ends, [i, i], color=colour, linewidth=1.6)
        axes.plot([row.value], [i], "o", color=colour, markersize=5)
    if chart.log:
        axes.set_xscale("log")
    axes.set_yticks(range(len(chart.rows)), [plain(row.label, 24) for row in chart.rows])
    axes.set_ylim(len(chart.rows) - 0.5, -0.5)
    axes.set_xlabel(plain(chart.x_label))
    axes.grid(alpha=0.25, axis="x")
    return made
