"""Figures as SVG within the page: small, and in the page's own colours, so that themes apply."""

import base64
import itertools
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from moejax.analysis.report.charts import (
    Chart,
    Forest,
    HeatMap,
    Interval,
    Line,
    LineChart,
    some,
    tick_label,
    ticks,
)
from moejax.analysis.report.html import Html, escape, join, tag

WIDTH, HEIGHT = 360, 226
COLOURS = 8  # --c0 to --c7 of the style sheet
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 20, 38
# Colours of heat maps are laid over the page's own ground by their opacity.
BELOW, ABOVE, AMOUNT = (47, 116, 192), (214, 84, 45), (91, 77, 190)


def figure(chart: Chart) -> Html:
    """A figure with its heading, legend, drawing and caption."""
    draw = {LineChart: _line_chart, HeatMap: _heat_map, Forest: _forest}[type(chart)]
    drawing, described = draw(chart)
    caption = chart.caption
    if isinstance(chart, LineChart) and chart.cuts:
        caption += " The first steps lie above the frame."
    return tag(
        "figure",
        tag("figcaption", tag("span", chart.title, class_="title"), _legend(chart)),
        Html(drawing.replace("<svg", f'<svg aria-label="{escape(described)}"', 1)),
        tag("p", caption, class_="note") if caption else "",
        id=f"figure-{chart.name}",
    )  # fmt: skip


def _colour(line: Line, letter: str) -> str:
    """The classes of a curve's colour; beyond as many as there are, they come again, dashed."""
    late = " late" if line.colour >= COLOURS and line.label else ""
    return f"{letter}{line.colour % COLOURS}{late}"


def _legend(chart: Chart) -> Html:
    if not isinstance(chart, LineChart):
        return Html("")
    named = [line for line in chart.lines if line.label]
    if len(named) < 2:
        return Html("")
    items = [
        tag("li", tag("span", class_=f"key {line.style} {_colour(line, 'k')}"), line.label)
        for line in named
    ]
    return tag("ul", *items, class_="legend")


def _svg(parts: Sequence[str], width: float = WIDTH, height: float = HEIGHT) -> Html:
    inner = "".join(parts)
    return Html(f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{inner}</svg>')


def _text(x: float, y: float, content: str, class_: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{class_}">{escape(content)}</text>'


def _path(class_: str, points: str) -> str:
    return f'<path class="{class_}" d="{points}"/>'


class _Axis:
    """From values to places along one side of a drawing."""

    def __init__(
        self, limits: tuple[float, float], ends: tuple[float, float], log: bool = False,
        whole: bool = False,
    ):  # fmt: skip
        self.low, self.high, self.log, self.whole, self._ends = *limits, log, whole, ends

    def __call__(self, value: np.ndarray | float) -> np.ndarray | float:
        scale = np.log if self.log else lambda v: v
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self._ends[0] + share * (self._ends[1] - self._ends[0])

    def ticks(self, count: int) -> list[tuple[float, str]]:
        found = ticks(self.low, self.high, count, self.log, self.whole)
        gaps = [b - a for a, b in itertools.pairwise(found)] or [self.high - self.low]
        return [(value, tick_label(value, min(gaps[0], value) if self.log else gaps[0]))
                for value in found]  # fmt: skip


def _line_chart(chart: LineChart) -> tuple[Html, str]:
    across, up = chart.limits
    x = _Axis(across, (LEFT, WIDTH - RIGHT), chart.log_x, chart.whole)
    y = _Axis(up, (HEIGHT - BOTTOM, TOP))
    parts = _frame(x, y, chart)
    clip = f"clip-{chart.name}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT - 3}" y="{TOP - 3}" '
        f'width="{WIDTH - LEFT - RIGHT + 6}" height="{HEIGHT - TOP - BOTTOM + 6}"/></clipPath>'
        f'<g clip-path="url(#{clip})">'
    )
    for label, value in chart.references:
        at = y(value)
        parts.append(_path("reference", f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}"))
        parts.append(_text(WIDTH - RIGHT - 3, at - 3, label, "reference end"))
    for line in chart.lines:
        if line.band is not None:
            area = _area(x(line.x), y(line.band[0]), y(line.band[1]))
            thin = " thin" if len(chart.lines) > 4 else ""
            parts.append(_path(f"band{thin} f{line.colour % COLOURS}", area))
    for line in chart.lines:
        stroke = f"curve {line.style} {_colour(line, 's')}"
        parts.append(_path(stroke, _polyline(x(line.x), y(line.y))))
        if line.style == "points":
            dots = _dots(x(line.x), y(line.y))
            parts.append(_path(f"dots s{line.colour % COLOURS}", dots))
    parts.append("</g>")
    return _svg(parts), _describe(chart)


def _frame(x: _Axis, y: _Axis, chart: LineChart) -> list[str]:
    """Grid, ticks and labels of the axes."""
    floor = HEIGHT - BOTTOM
    parts = []
    for value, label in y.ticks(4):
        at = y(value)
        parts.append(_path("grid", f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}"))
        parts.append(_text(LEFT - 5, at + 3.5, label, "end"))
    end = 0.0  # of the label before
    for value, label in x.ticks(4):
        at = x(value)
        parts.append(_path("tick", f"M{at:.1f} {floor}v4"))
        label = label if not chart.money else _money(label)
        half = 3.2 * len(label)
        if at - half > end:
            parts.append(_text(at, floor + 15, label, "middle"))
            end = at + half + 3
    parts.append(_path("axis", f"M{LEFT} {floor}H{WIDTH - RIGHT}"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, chart.x_label, "middle label"))
    parts.append(_text(4, 11, chart.y_label, "label"))
    return parts


def _money(label: str) -> str:
    return f"-${label[1:]}" if label.startswith("-") else f"${label}"


def _polyline(xs: np.ndarray, ys: np.ndarray) -> str:
    """Path commands in tenths of a unit; a value that is no number lifts the pen."""
    known = np.isfinite(xs) & np.isfinite(ys)
    words, pen = [], "M"
    for px, py, good in zip(xs.tolist(), ys.tolist(), known.tolist(), strict=True):
        if not good:
            pen = "M"
            continue
        words.append(f"{pen}{px:.1f} {max(min(py, 1e4), -1e4):.1f}")
        pen = "L"
    return "".join(words)


def _area(xs: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    known = np.isfinite(xs) & np.isfinite(low) & np.isfinite(high)
    xs, low, high = xs[known], low[known], high[known]
    there = _polyline(xs, high)
    back = _polyline(xs[::-1], low[::-1]).replace("M", "L", 1)
    return f"{there}{back}Z" if there else ""


def _dots(xs: np.ndarray, ys: np.ndarray) -> str:
    """Dots as strokes of no length with round ends: one path for all."""
    known = np.isfinite(xs) & np.isfinite(ys)
    pairs = zip(xs[known].tolist(), ys[known].tolist(), strict=True)
    return "".join(f"M{px:.1f} {py:.1f}h0" for px, py in pairs)


def _describe(chart: LineChart) -> str:
    ends = []
    for line in chart.lines[:8]:
        known = line.y[np.isfinite(line.y)]
        if len(known):
            ends.append(f"{line.label or 'the curve'} ends at {known[-1]:.4g}")
    more = f", and {len(chart.lines) - 8} more curves" if len(chart.lines) > 8 else ""
    return f"Line chart: {chart.y_label} over {chart.x_label}; {', '.join(ends)}{more}."


def _heat_map(chart: HeatMap) -> tuple[Html, str]:
    rows = len(chart.values)
    left = 14 + 6.2 * min(max((len(name) for name in chart.rows), default=1), 16)
    cell = min(max(150 / rows, min(5.0, 240 / rows)), 18.0)
    height = rows * cell
    top, width = 34, WIDTH - RIGHT - left
    image = base64.b64encode(_png(_colours(chart))).decode()
    parts = [
        f'<image x="{left:.1f}" y="{top}" width="{width:.1f}" height="{height:.1f}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{image}"/>',
        f'<rect class="frame" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{height:.1f}"/>',
    ]
    for i in some(rows, height / 12):
        shown = _cut(chart.rows[i], 16)
        parts.append(_text(left - 5, top + (i + 0.5) * cell + 3.5, shown, "end"))
    for place, name in chart.column_ticks(width / 6):
        parts.append(_text(left + place * width, top + height + 14, name, "middle"))
    parts.append(_text(left + width / 2, top + height + 29, chart.x_label, "middle label"))
    parts.append(_text(4, 11, chart.y_label, "label"))
    parts += _scale(chart)
    return _svg(parts, height=top + height + 34), _describe_heat(chart)


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _scale(chart: HeatMap) -> list[str]:
    """The colours' meaning, at the upper right."""
    top = f"{chart.top:.2g}"
    middle, high = {"diverging": ("1", f"≥ {top}"), "sequential": ("", top)}[chart.scale]
    right, wide = WIDTH - RIGHT, 110
    start = right - wide
    values = np.linspace(0, chart.top, 44)[None]
    strip = base64.b64encode(_png(paint(values, chart.scale, chart.top))).decode()
    parts = [
        f'<image x="{start}" y="4" width="{wide}" height="8" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{strip}"/>',
        f'<rect class="frame" x="{start}" y="4" width="{wide}" height="8"/>',
        _text(start, 23, "0", "small"),
        _text(right, 23, high, "end small"),
    ]
    if middle:
        parts.append(_text(start + wide / chart.top, 23, middle, "middle small"))
    return parts


def _colours(chart: HeatMap) -> Int[np.ndarray, "rows columns 4"]:
    return paint(chart.values, chart.scale, chart.top)


def paint(values: Float[np.ndarray, "r c"], scale: str, top: float) -> Int[np.ndarray, "r c 4"]:
    """Red, green, blue and opacity of each value; nan is clear."""
    if scale == "diverging":
        above = np.clip((values - 1) / max(top - 1, 1e-9), 0, 1)
        opacity = np.where(values >= 1, above, np.clip(1 - values, 0, 1))
        hue = np.where((values >= 1)[..., None], ABOVE, BELOW)
    else:
        opacity = np.clip(values / max(top, 1e-12), 0, 1)
        hue = np.broadcast_to(AMOUNT, (*values.shape, 3))
    alpha = np.where(np.isfinite(values), 255 * opacity, 0)
    return np.concatenate([hue, alpha[..., None]], axis=-1).round().astype(np.uint8)


def _png(pixels: Int[np.ndarray, "h w 4"]) -> bytes:
    """The bytes of a PNG file (RFC 2083), 8 bits a channel with opacity."""
    height, width, _ = pixels.shape
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    magic = b"\x89PNG\r\n\x1a\n"
    return magic + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _describe_heat(chart: HeatMap) -> str:
    known = chart.values[np.isfinite(chart.values)]
    spread = f"from {known.min():.3g} to {known.max():.3g}" if len(known) else "without values"
    rows, columns = chart.values.shape
    return (
        f"Heat map: {chart.title}; {rows} rows ({chart.y_label}) by {columns} columns "
        f"({chart.x_label}), {spread}."
    )


def _forest(chart: Forest) -> tuple[Html, str]:
    """Wider than the others; names stand above their intervals, so that it stays readable small."""
    row, top, left, right = 34, 8, 10, 10
    height = top + row * len(chart.rows) + 34
    x = _Axis(_forest_limits(chart), (left, WIDTH - right), chart.log)
    floor = height - 32
    parts = []
    if chart.margin:
        low, high = x(chart.zero - chart.margin), x(chart.zero + chart.margin)
        parts.append(
            f'<rect class="margin" x="{low:.1f}" y="{top}" width="{high - low:.1f}" '
            f'height="{floor - top}"/>'
        )
    for value, label in x.ticks(4):
        at = x(value)
        parts.append(_path("grid", f"M{at:.1f} {top}V{floor}"))
        parts.append(_text(min(max(at, 14), WIDTH - 14), floor + 14, label, "middle"))
    parts.append(_path("zero", f"M{x(chart.zero):.1f} {top}V{floor}"))
    for i, interval in enumerate(chart.rows):
        parts += _interval(x, interval, top + i * row)
    parts.append(_text(WIDTH / 2, height - 3, chart.x_label, "middle label"))
    told = "; ".join(
        f"{r.label} {r.value:.4g} ({r.low:.4g} to {r.high:.4g})" for r in chart.rows
        if math.isfinite(r.value)
    )  # fmt: skip
    return _svg(parts, height=height), f"Intervals, {chart.x_label}: {told}."


def _forest_limits(chart: Forest) -> tuple[float, float]:
    ends = [v for r in chart.rows for v in (r.low, r.value, r.high) if math.isfinite(v)]
    ends += [chart.zero - chart.margin, chart.zero + chart.margin]
    low, high = min(ends), max(ends)
    if chart.log:
        low, high = max(low, 1e-6), max(high, 2e-6)
        room = (high / low) ** 0.05 if high > low else 1.5
        return low / room, high * room
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _interval(x: _Axis, interval: Interval, top: float) -> list[str]:
    parts = [
        _text(10, top + 12, _cut(interval.label, 56 - len(interval.text)), "name"),
        _text(WIDTH - 10, top + 12, interval.text, "end told"),
    ]
    if not math.isfinite(interval.value):
        return parts
    inside = lambda v: min(max(v, x.low), x.high)
    low, high, at = x(inside(interval.low)), x(inside(interval.high)), x(inside(interval.value))
    y = top + 22
    parts.append(_path(f"interval {interval.kind}", f"M{low:.1f} {y}H{high:.1f}"))
    for end, known in ((low, interval.low), (high, interval.high)):
        if math.isfinite(known):
            parts.append(_path(f"interval {interval.kind}", f"M{end:.1f} {y - 3}v6"))
    parts.append(_path(f"dot {interval.kind}", f"M{at:.1f} {y}h0"))
    return parts


def gallery(charts: Sequence[Chart]) -> Html:
    """Figures side by side where there is room."""
    if not charts:
        return Html("")
    return tag("div", join(figure(chart) for chart in charts), class_="gallery")
