"""Curves of learning: one run's, or groups of runs that differ in their seed, over four axes."""

from collections.abc import Mapping, Sequence

import numpy as np

from moejax.analysis.report.charts import Line, LineChart
from moejax.analysis.report.curves import AXES
from moejax.analysis.report.gather import RunRecord

GRID = 160  # places at which the runs of a group are compared
MOST_GROUPS = 8
MOST_POINTS = 24  # that are drawn as points

Groups = Mapping[str, Sequence[RunRecord]]


def run_charts(run: RunRecord) -> list[LineChart]:
    """Training and held-out loss of one run over tokens, FLOPs, seconds and dollars."""
    curves, factor = run.curves, run.bits_per_nat
    if not len(curves.steps):
        return []
    unit = "nats per token" if factor is None else "bits per byte of the text"
    factor = factor or 1.0
    baselines = (run.summary or {}).get("baselines", {}) if run.bits_per_nat else {}
    names = (("gzip", "gzip -9"), ("unigram", "unigram"))
    references = [(label, baselines[name]) for name, label in names if name in baselines]
    charts = []
    for axis, label in AXES.items():
        lines = [Line("training", curves.at(axis, curves.steps), curves.loss * factor,
                      (curves.low * factor, curves.high * factor), 0)]  # fmt: skip
        checks = [row for row in curves.validation if row.get("val_loss") is not None]
        if checks:
            steps = [row["step"] for row in checks]
            losses = np.array([row["val_loss"] for row in checks], float)
            lines.append(Line("held out", curves.at(axis, steps), losses * factor, None, 1,
                              "points"))  # fmt: skip
        if not np.isfinite(lines[0].x).any():
            continue
        charts.append(LineChart(
            f"loss-{axis}", f"Loss over {_short(axis)}", "", label, unit, lines, references,
            cut_start=True, money=axis == "dollars",
        ))  # fmt: skip
    return charts


def _short(axis: str) -> str:
    return {"tokens": "tokens", "model_flops": "FLOPs", "seconds": "device time"}.get(axis, axis)


def note(run: RunRecord) -> str:
    """What the curves of one run show, in a sentence or two."""
    said = "Training loss: the mean of each stretch of logged steps, and the least and largest."
    if run.bits_per_nat:
        said += (
            " Nats per token of training text are given in bits per byte by the held-out text's "
            "bytes per token."
        )
    return said


def group_charts(groups: Groups, *, what: str, order: Sequence[str]) -> list[LineChart]:
    """Held-out loss of groups over four axes, then their training loss over tokens.

    Args:
      groups: runs that differ in their seed only, by the group's name.
      what: what the groups are, in words: ``variant``.
      order: of all groups there are, which gives each its colour.
    """
    caption = (
        f"One curve a {what}: the mean over its seeds; the band reaches from the lowest seed to "
        "the highest."
    )
    charts = []
    for axis, label in AXES.items():
        lines = _lines(groups, axis, _held_out, order)
        # A validation at the end alone is in the tables, and is no curve.
        if any(len(line.x) > 1 for line in lines):
            charts.append(LineChart(
                f"held-out-{axis}", f"Held-out loss over {_short(axis)}", "" if charts else caption,
                label, "bits per byte", lines, cut_start=True, money=axis == "dollars",
            ))  # fmt: skip
    for field, name, title, unit, zero in (
        ("loss", "training", "Training loss over tokens", "nats per token", False),
        ("router/max_violation", "max-violation", "MaxVio over tokens", "MaxVio of a batch", True),
    ):
        lines = _lines(groups, "tokens", lambda run, field=field: _logged(run, field), order)
        if lines:
            more = " Mean over layers; 0 is perfect balance." if zero else ""
            charts.append(LineChart(
                f"{name}-tokens", title, caption + more, AXES["tokens"], unit, lines,
                zero=zero, cut_start=not zero,
            ))  # fmt: skip
    return charts


def _held_out(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in run.curves.validation if row.get("val_bits_per_byte") is not None]
    return (
        np.array([row["step"] for row in rows], float),
        np.array([row["val_bits_per_byte"] for row in rows], float),
    )


def _logged(run: RunRecord, field: str) -> tuple[np.ndarray, np.ndarray]:
    if field == "loss":
        return run.curves.steps, run.curves.loss
    return run.curves.series(field)


def _lines(groups: Groups, axis: str, read, order: Sequence[str]) -> list[Line]:
    lines = []
    for label, runs in groups.items():
        seeds = []
        for run in runs:
            steps, values = read(run)
            x = run.curves.at(axis, steps)
            if np.isfinite(x).any():
                seeds.append((steps, x, values))
        if seeds:
            colour = order.index(label)
            lines.append(_mean_line(label, seeds, colour, few=read is _held_out))
    return lines


def _mean_line(label: str, seeds: Sequence[tuple[np.ndarray, ...]], colour: int, few: bool) -> Line:
    """The mean of curves at equal steps, as far as all go; few points are drawn as points.

    Seconds and dollars differ from seed to seed, so their mean is taken as well.
    """
    longest = max((steps for steps, *_ in seeds), key=len)
    style = "points" if few and len(longest) <= MOST_POINTS else "line"
    end = min(steps[-1] for steps, *_ in seeds)
    start = max(steps[0] for steps, *_ in seeds)
    grid = longest[(longest >= start) & (longest <= end)]
    if len(seeds) > 1 and len(grid) > GRID:
        grid = np.linspace(grid[0], grid[-1], GRID)
    x = np.mean([np.interp(grid, steps, place) for steps, place, _ in seeds], axis=0)
    heights = np.array([np.interp(grid, steps, values) for steps, _, values in seeds])
    band = None if len(seeds) == 1 else (heights.min(0), heights.max(0))
    return Line(label, x, heights.mean(0), band, colour, style)
