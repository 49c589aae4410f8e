"""``moejax ledger`` as a table for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.cost import text
from moejax.cost.plan_against import PARTS
from moejax.cost.plan_text import exchange_bytes
from moejax.cost.segments import PHASES
from moejax.cost.totals import USES

_USES = {
    "steps": "training", "redone": "redone steps", "stalls": "stalls",
    "around": "start-up, compilation, evaluation, checkpoints",
}  # fmt: skip
_REFUSED = "not counted"


def format_ledger(summary: Mapping[str, Any]) -> str:
    """``moejax.cost.bill.summarize``'s result as text."""
    lines = [
        f"{label:<7} {line}" if label != _REFUSED else f"{label}: {line}"
        for label, line in ledger_lines(summary)
    ]
    return "\n".join([text.columns(ledger_rows(summary), left=4), "", *lines])


def ledger_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands below the table of runs, as (label, text): uses, phases, prices, plans."""
    runs, total = summary["runs"], summary["total"]
    all_in = total["all_in"]
    sources = "; ".join(dict.fromkeys(run["energy_source"] for run in runs))
    energy = f"{text.energy(all_in['energy_kwh'])}, {text.carbon(all_in['co2_kg'])}"
    return [
        *(("went to", line) for line in _made_of(total)),
        ("time", _phases(runs)),
        *(("redone", line) for line in _redone(runs)),
        *(("idle", line) for line in _idle(runs)),
        *(("sent", line) for run in runs for line in _sent(run)),
        ("energy", f"{energy} ({sources}, all in)"),
        ("prices", "; ".join(_prices(runs))),
        *(("plan", line) for run in runs for line in _plan(run)),
        *((_REFUSED, message) for message in summary["unreadable"]),
    ]


def ledger_rows(summary: Mapping[str, Any]) -> list[Sequence[str]]:
    """The table of runs, headings first.

    Runs, subtotals where there are several, and totals; owners' dollars where any are known.
    """
    runs, total = summary["runs"], summary["total"]
    owned = any(run["dollars_owned"] is not None for run in runs)
    rows: list[Sequence[str]] = [(
        "run", "stage", "status", "devices", "wall", "device-h", "dollars",
        *(["owned"] if owned else []), "tokens", "FLOP", "MFU", "goodput",
    )]  # fmt: skip
    for run in runs:
        rows.append((
            f"{run['id']}{' *' if run['final'] else ''}", run["stage"], run["status"],
            f"{run['devices']} {run['device']}", text.duration(run["wall_seconds"]),
            *_sums(run, owned), text.percent(run["mfu"]), text.percent(run["goodput"]),
        ))  # fmt: skip
    sums = lambda label, stage, status, group: (
        label, stage, status, _runs(group["runs"]), "", *_sums(group, owned), "", "",
    )  # fmt: skip
    for name, column in (("by_stage", 1), ("by_status", 2)):
        if len(total[name]) > 1:
            for key, group in total[name].items():
                rows.append(sums("", *(key if i == column else "" for i in (1, 2)), group))
    for label, name in (("headline *", "headline"), ("all in", "all_in")):
        group = total[name]
        rows.append((label, _runs(group["runs"]), "", "", "", *_sums(group, owned), "", ""))
    return rows


def _runs(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"


def _sums(figures: Mapping[str, Any], owned: bool) -> tuple[str, ...]:
    return (
        f"{figures['device_hours']:.3g}", text.dollars(figures["dollars"]),
        *([text.dollars(figures["dollars_owned"])] if owned else []),
        text.si(figures["tokens"]), text.si(figures["model_flops"]),
    )  # fmt: skip


def _made_of(total: Mapping[str, Any]) -> list[str]:
    """What the all-in dollars are made of, and all-in over headline where they differ."""
    if total["ratio"] is None:
        return []
    pieces = []
    for name, piece in total["made_of"].items():
        if piece["dollars"] > 0:
            more = "" if name in USES else f" ({_runs(piece['runs'])})"
            pieces.append(f"{_USES.get(name, name)} {text.dollars(piece['dollars'])}{more}")
    ratio = f"; all in is {total['ratio']:.2f} times the headline" if total["ratio"] > 1 else ""
    return [", ".join(pieces) + ratio]


def _phases(runs: Sequence[Mapping[str, Any]]) -> str:
    seconds = {name: sum(run["seconds"][name] for run in runs) for name in PHASES}
    return ", ".join(f"{k} {text.duration(v)}" for k, v in seconds.items() if v) or "none"


def _redone(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for run in runs:
        again = run["redone"]
        if again is None:
            lines.append(f"{run['id']}: not known, its ledger does not say where it resumed from")
        elif again["tokens"]:
            lines.append(
                f"{run['id']}: {again['steps']} steps, {text.si(again['tokens'])} of "
                f"{text.si(run['tokens'])} tokens, {text.dollars(again['dollars'])}; its model "
                f"has seen {text.si(run['tokens_seen'])}"
            )
    return lines


def _idle(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    idle = {unit: sum(run["idle"][unit] for run in runs) for unit in ("seconds", "dollars")}
    if idle["seconds"] < 1:
        return []
    return [
        f"{text.duration(idle['seconds'])} between segments by the wall clock, not billed; "
        f"devices that were kept cost {text.dollars(idle['dollars'])} more"
    ]


def _sent(run: Mapping[str, Any]) -> list[str]:
    """The exchange of tokens with experts on other devices."""
    sent = run["exchange"]
    if sent is None:
        return []
    time = "its time is not known: the links have no published speed"
    if sent["dollars"] is not None:
        time = (
            f"{text.percent(sent['share'])} of training, {text.dollars(sent['dollars'])}, not "
            f"hidden ({sent['source']}: {sent['assumption']})"
        )
    return [
        f"{run['id']}: {exchange_bytes(sent) or '0 B'} a token, {sent['kind']} over "
        f"{sent['expert_devices']} devices, {sent['devices_per_node']} a machine; {time}"
    ]


def _prices(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every rate that a segment was charged at, once."""
    parts = [part for run in runs for part in run["segments"]]
    rate = lambda p: f"${p['dollars_per_hour']:g}/h ({p['source']}, {p['date']})"
    return sorted({f"{part['device']} {rate(part['price'])}" for part in parts})


def _plan(run: Mapping[str, Any]) -> list[str]:
    """Planned against actual, and the parts of the difference, largest first."""
    against = run["plan"]
    if against is None:
        return []
    planned, actual = against["planned"], against["actual"]
    # A rate of nothing leaves no dollars to compare.
    unit = "dollars" if planned["dollars"] and actual["dollars"] else "device_hours"
    parts = {name: part[unit] for name, part in against["parts"].items()}
    smallest = max(map(abs, parts.values())) / 100
    shown = sorted((name for name in parts if abs(parts[name]) > smallest),
                   key=lambda name: -abs(parts[name]))  # fmt: skip
    mfu = f" {text.percent(actual['mfu'])} for {text.percent(planned['mfu'])}"
    named = lambda name: PARTS[name] + (mfu if name == "utilisation" else "")
    why = ", ".join(f"{named(name)} {_signed(parts[name], unit)}" for name in shown)
    return [
        f"{run['id']}: {text.dollars(actual['dollars'])} for {text.dollars(planned['dollars'])} "
        f"planned{_ratio(actual[unit], planned[unit])}, {actual['device_hours']:.3g} for "
        f"{planned['device_hours']:.3g} device-hours, {text.si(actual['tokens'])} for "
        f"{text.si(planned['tokens'])} tokens\n        because of {why or 'nothing'}",
    ]


def _ratio(actual: float, planned: float) -> str:
    """How far apart two figures are, as a percentage or, where that would be long, as times."""
    if not planned:
        return ""
    ratio = actual / planned
    return f" ({ratio:,.0f} times)" if ratio > 10 else f" ({100 * ratio - 100:+.1f} %)"


def _signed(value: float, unit: str) -> str:
    size = text.dollars(abs(value)) if unit == "dollars" else f"{abs(value):.2g} h"
    return ("-" if value < 0 else "+") + size
