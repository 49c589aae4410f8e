"""Quantities and tables as text, for the plan and the ledger."""

from collections.abc import Sequence

_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"),
             (1e6, "M"), (1e3, "k"))  # fmt: skip


def si(value: float | None, unit: str = "") -> str:
    """A quantity with an SI prefix and three significant digits: ``36.6 GFLOP``."""
    if value is None:
        return "unknown"
    for size, prefix in _PREFIXES:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def parameters(value: float) -> str:
    """A count in the field's way: ``16.4B``, ``3.2M``."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size * 0.9995:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def dollars(value: float | None) -> str:
    """US dollars: cents where they matter, more digits below ten cents."""
    if value is None:
        return "unknown"
    if 0 < value < 0.1:
        return f"${value:.2g}" if value >= 1e-4 else f"${value:.1e}"
    return f"${value:,.2f}" if value < 10_000 else f"${value:,.0f}"


def duration(seconds: float | None) -> str:
    """A span of time in its natural unit: ``42.0 s``, ``3 min 20 s``, ``5.4 h``, ``54.2 days``."""
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.1f} days"


def energy(kwh: float | None) -> str:
    """Energy from kWh: ``3.18 GWh``, ``10.1 mWh``."""
    if kwh is None:
        return "energy unknown"
    return f"{kwh * 1e6:.3g} mWh" if 0 < kwh < 1e-3 else si(kwh * 1e3, "Wh")


def carbon(kg: float | None) -> str:
    """Carbon from kg: ``1,510 t CO2``, ``4.8 g CO2``."""
    if kg is None:
        return "CO2 unknown"
    if kg >= 1e3:
        return f"{kg / 1e3:,.4g} t CO2" if kg < 1e6 else f"{kg / 1e3:,.0f} t CO2"
    return f"{kg:.3g} kg CO2" if kg >= 1 else f"{kg * 1e3:.3g} g CO2"


def percent(share: float | None) -> str:
    """A share as a percentage, a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length as aligned columns, the first ``left`` of them flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def with_notes(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """``columns`` with a note, flush left, after each row."""
    lines = columns(rows).splitlines()
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True))
