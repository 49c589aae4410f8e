"""Published bills as a table."""

import textwrap
from typing import Any

from moejax.cost import text

HEADINGS = {
    "derived": "derived from tokens, architecture, utilisation and rates",
    "echoed": "echoed: the source's own hours times a rate; no proof of anything",
    "implied": "implied, in no source",
}
_INDENT = {"initial_indent": "  ", "subsequent_indent": "    "}


def format_published(found: dict[str, Any]) -> str:
    """``published``'s result: bill by bill, each kind of figure on its own."""
    summary = found["summary"]
    parts = [_bill(bill) for bill in found["bills"]]
    return "\n\n".join(parts) + (
        f"\n\n{summary['reproduced']} of {summary['derived']} derived figures reproduced within "
        f"their tolerance; {summary['echoed']} echoed, {summary['implied']} implied"
    )


def _bill(bill: dict[str, Any]) -> str:
    rows, headings = [], []
    for kind, heading in HEADINGS.items():
        figures = [figure for figure in bill["figures"] if figure["kind"] == kind]
        if figures:
            headings.append((len(rows), heading))
            rows += [_row(figure) for figure in figures]
    table = text.columns([["", "published", "moejax", "deviation"], *[row[:4] for row in rows]])
    top, *lines = table.splitlines()
    width = max(map(len, lines))
    lines = [f"{line:<{width}}  {row[4]}" for line, row in zip(lines, rows, strict=True)]
    for place, heading in reversed(headings):
        lines.insert(place, f"  {heading}")
    notes = [
        line
        for figure in bill["figures"]
        if figure["reproduced"] is False
        for line in textwrap.wrap(f"! {figure['name']}: {figure['why']}", 110, **_INDENT)
    ]
    inputs = textwrap.wrap(f"from {'; '.join(bill['inputs'])}", 110, **_INDENT)
    where = f"{bill['title']} ({', '.join(bill['sources'])})"
    return "\n".join([where, *inputs, top, *lines, *notes])


def _row(figure: dict[str, Any]) -> list[str]:
    deviation = figure["deviation"]
    off = "" if figure["reproduced"] is not False else " !"
    return [
        f"    {figure['name']}",
        "-" if figure["reported"] is None else amount(figure["reported"], figure["unit"]),
        amount(figure["computed"], figure["unit"]),
        "-" if deviation is None else f"{100 * deviation:+.2f} %{off}",
        figure["how"],
    ]


def amount(value: float, unit: str) -> str:
    """A value with its unit: bytes exactly, everything else with four digits."""
    if unit == "B":
        return f"{value:,.0f} B"
    if unit == "USD":
        return f"${text.parameters(value)}"
    if unit == "FLOP":
        return _four(value, "FLOP")
    if unit == "":
        return text.parameters(value)
    if unit == "GPU-hours":
        return f"{text.parameters(value)} h"
    return f"{value:,.4g} {unit}"


def _four(value: float, unit: str) -> str:
    """An SI prefix and four digits, so that a deviation of 0.1 % shows."""
    for size, prefix in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T")):
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value / 1e9:.4g} G{unit}"
