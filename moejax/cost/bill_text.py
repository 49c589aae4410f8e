"""``moejax ledger`` as a table for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.cost import energy, text
from moejax.cost.plan_against import PARTS
from moejax.cost.segments import PHASES
from moejax.cost.totals import USES

_HEAD = ("run", "stage", "status", "devices", "wall", "device-h", "dollars", "tokens", "FLOP",
         "MFU", "goodput")  # fmt: skip
_USES = {
    "steps": "training", "redone": "redone steps", "stalls": "stalls",
    "around": "start-up, compilation, evaluation, checkpoints",
}  # fmt: skip


def format_ledger(summary: Mapping[str, Any]) -> str:
    """``moejax.cost.bill.summarize``'s result as text."""
    runs, total = summary["runs"], summary["total"]
    all_in = total["all_in"]
    lines = [
        text.columns(_rows(runs, total), left=4),
        "",
        *(f"all in  {line}" for line in _made_of(total)),
        f"time    {_phases(runs)}",
        *(f"redone  {line}" for line in _redone(runs)),
        *(f"idle    {line}" for line in _idle(runs)),
        f"energy  {text.energy(all_in['energy_kwh'])}, {text.carbon(all_in['co2_kg'])} "
        f"({energy.SOURCE}, all in)",
        f"prices  {'; '.join(_prices(runs))}",
        *(f"plan    {line}" for run in runs for line in _plan(run)),
        *(f"not counted: {message}" for message in summary["unreadable"]),
    ]
    return "\n".join(lines)


def _rows(runs: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [_HEAD]
    for run in runs:
        rows.append((
            f"{run['id']}{' *' if run['final'] else ''}", run["stage"], run["status"],
            f"{run['devices']} {run['device']}", text.duration(run["wall_seconds"]),
            *_sums(run), text.percent(run["mfu"]), text.percent(run["goodput"]),
        ))  # fmt: skip
    sums = lambda label, stage, status, group: (
        label, stage, status, _runs(group["runs"]), "", *_sums(group), "", "",
    )  # fmt: skip
    for name, column in (("by_stage", 1), ("by_status", 2)):
        if len(total[name]) > 1:
            for key, group in total[name].items():
                rows.append(sums("", *(key if i == column else "" for i in (1, 2)), group))
    for label, name in (("headline *", "headline"), ("all in", "all_in")):
        group = total[name]
        rows.append((label, _runs(group["runs"]), "", "", "", *_sums(group), "", ""))
    return rows


def _runs(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"


def _sums(figures: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{figures['device_hours']:.3g}", text.dollars(figures["dollars"]),
        text.si(figures["tokens"]), text.si(figures["model_flops"]),
    )  # fmt: skip


def _made_of(total: Mapping[str, Any]) -> list[str]:
    """All-in over headline, and what the all-in dollars are made of."""
    if total["ratio"] is None:
        return []
    pieces = []
    for name, piece in total["made_of"].items():
        if piece["dollars"] > 0:
            more = "" if name in USES else f" ({_runs(piece['runs'])})"
            pieces.append(f"{_USES.get(name, name)} {text.dollars(piece['dollars'])}{more}")
    return [f"{total['ratio']:.2f} times the headline: {', '.join(pieces)}"]


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


def _prices(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every rate that a segment was charged at, once."""
    parts = [part for run in runs for part in run["segments"]]
    rate = lambda p: f"${p['dollars_per_hour']:g}/h ({p['source']}, {p['date']})"
    return sorted({f"{part['device']} {rate(part['price'])}" for part in parts})


def _plan(run: Mapping[str, Any]) -> list[str]:
    """Planned against actual in one line, with the parts of the difference, largest first."""
    against = run["plan"]
    if against is None:
        return []
    planned, actual = against["planned"], against["actual"]
    parts = {name: part["dollars"] for name, part in against["parts"].items()}
    largest = max(abs(value) for value in parts.values())
    shown = sorted(
        (name for name in parts if abs(parts[name]) > largest / 100), key=lambda n: -abs(parts[n])
    )
    mfu = f" {text.percent(actual['mfu'])} for {text.percent(planned['mfu'])}"
    named = lambda name: PARTS[name] + (mfu if name == "utilisation" else "")
    why = ", ".join(f"{named(name)} {_signed(parts[name])}" for name in shown)
    ratio = actual["dollars"] / planned["dollars"] - 1 if planned["dollars"] else None
    more = "" if ratio is None else f" ({100 * ratio:+.1f} %)"
    return [
        f"{run['id']}: {text.dollars(actual['dollars'])} for {text.dollars(planned['dollars'])} "
        f"planned{more}, {actual['device_hours']:.3g} for {planned['device_hours']:.3g} "
        f"device-hours, {text.si(actual['tokens'])} for {text.si(planned['tokens'])} tokens: {why}"
    ]


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + text.dollars(abs(value))
