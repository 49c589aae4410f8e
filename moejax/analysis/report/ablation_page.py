"""Sections of a report on an ablation: verdicts first, then what they rest on."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.analysis.ablation_text import compared_budget
from moejax.analysis.power import PRACTICAL_SEEDS
from moejax.analysis.report import ablation_charts, card, learning, money, run_page, set_page
from moejax.analysis.report.charts import Chart
from moejax.analysis.report.gather import Ablation, RunRecord, Subject
from moejax.analysis.report.html import (
    UNKNOWN,
    Html,
    badge,
    between,
    details,
    join,
    number,
    p_value,
    paragraph,
    table,
    tag,
)
from moejax.analysis.report.page import Section
from moejax.analysis.report.svg import gallery
from moejax.cost import text

OUTCOMES = {"agrees in direction": "good", "disagrees": "bad", "cannot tell": "unsure"}
MOST_SENTENCES = 6  # beyond, they are folded away
MOST_CELLS = 16  # beyond, the table of cells is folded away


def opening(subject: Subject) -> Html:
    """The claim, what came of it, and the ablation in cards."""
    ablation = _ablation(subject)
    analysis = ablation.analysis
    claim, outcome = analysis.get("claim") or {}, analysis.get("claim_outcome")
    parts = []
    why = analysis.get("claim_text") or ""
    if claim.get("text"):
        source = f" ({claim['source']})" if claim.get("source") else ""
        parts.append(paragraph("Claim: ", claim["text"], source, class_="lead"))
    if outcome:
        found = badge(outcome, OUTCOMES.get(outcome, "plain"))
        parts.append(paragraph("Found here: ", found, f" {why}"))
    return join([*parts, run_page.cards(_figures(subject, ablation))])


def _ablation(subject: Subject) -> Ablation:
    assert subject.ablation is not None
    return subject.ablation


def _figures(subject: Subject, ablation: Ablation) -> list[tuple[str, str, str]]:
    analysis = ablation.analysis
    failed = len(analysis["failed"])
    cells = str(len(ablation.cells)) if ablation.cells else UNKNOWN
    budget = _budget(ablation)
    figures = [
        ("variants", str(len(analysis["variants"])), f"reference {analysis['reference']}"),
        ("seeds", str(len(analysis["seeds"])), f"pooled sd {number(pooled(analysis), '.2g')}"),
        ("held equal", budget[0], budget[1]),
        ("cells", cells, f"{failed} failed"),
    ]
    spent, planned = (amounts(analysis["bill"].get(name)) for name in ("spent", "planned"))
    if spent[0] is not None:
        hours = "" if spent[1] is None else f"{spent[1]:.3g} device-hours; "
        figures.append(("all in", text.dollars(spent[0]), f"{hours}planned "
                        f"{text.dollars(planned[0])}"))  # fmt: skip
    if subject.bill is not None:
        energy = subject.bill["total"]["all_in"]
        figures.append(("energy", text.energy(energy["energy_kwh"]), text.carbon(energy["co2_kg"])))
    return figures


def pooled(analysis: Mapping[str, Any]) -> float | None:
    """Standard deviation of one run's error, pooled over variants; the seeds' own luck is out."""
    return (analysis.get("pooled") or {}).get("sd")


def _budget(ablation: Ablation) -> tuple[str, str]:
    amounts = ", ".join(map(_si, ablation.analysis["budgets"]))
    return ablation.analysis["hold"].replace("_", " "), amounts


def amounts(entry: Any) -> tuple[float | None, float | None]:
    """Dollars and device-hours of an entry of the bill; None where they are not known."""
    if isinstance(entry, Mapping):
        return entry.get("dollars"), entry.get("device_hours")
    return (entry, None) if isinstance(entry, (int, float)) else (None, None)


def sections(subject: Subject) -> tuple[list[Section], list[Chart]]:
    """The sections, and the figures in them."""
    ablation = _ablation(subject)
    groups = curve_groups(ablation, subject.runs)
    verdicts = ablation_charts.differences(ablation)
    ladder = ablation_charts.by_budget(ablation)
    rates = ablation_charts.learning_rates(ablation)
    health = ablation_charts.balance(ablation)
    kept = set_page.best_groups(groups, always=ablation.analysis["reference"])
    order = list(ablation.analysis["variants"])
    curves = learning.group_charts(kept, what="variant", order=order) if kept else []
    looked, drawn = set_page.inspections({name: runs[0] for name, runs in groups.items() if runs})
    made = [
        Section("verdicts", "Verdicts", join([_verdicts(ablation), gallery(verdicts)])),
        Section("budgets", "Results by budget", join([
            gallery(ladder), _by_budget(ablation), _multipliers(ablation),
        ])),
        Section("learning", "Learning", gallery(curves)),
        Section("balance", "Balance", join([_health(ablation), gallery(health)])),
        Section("tuning", "Learning rates", join([_rates(ablation), gallery(rates)])),
        Section("bill", "The bill", join([_bill(ablation), money.bill(subject.bill)])),
        Section("cells", "Failures and cells", join([_failures(ablation), _cells(ablation)])),
        Section("routing", "Routers on held-out text", looked),
        Section("card", "Model card", _card(subject, groups)),
        Section("again", "Commands, versions, fingerprints", _again(subject, ablation)),
    ]  # fmt: skip
    return made, [*verdicts, *ladder, *curves, *health, *rates, *drawn]


def curve_groups(ablation: Ablation, runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Of each variant and seed the run whose curves are drawn: the longest that is not tuning.

    A decay branch logs from where it leaves its trunk, so it is drawn only where there is neither a
    trunk nor a run of its own.
    """
    by_name = {run.name: run for run in runs}
    rank = {"final": 2, "trunk": 1, "branch": 0}
    best: dict[tuple[str, Any], tuple] = {}
    for cell in ablation.cells:
        if cell.get("kind") not in rank or cell["id"] not in by_name:
            continue
        key = (cell["variant"], cell["seed"])
        place = (rank[cell["kind"]], cell.get("steps") or 0)
        if key not in best or place > best[key][0]:
            best[key] = (place, by_name[cell["id"]])
    groups: dict[str, list[RunRecord]] = {name: [] for name in ablation.analysis["variants"]}
    for (variant, _), (_, run) in best.items():
        groups.setdefault(variant, []).append(run)
    return {name: members for name, members in groups.items() if members}


def _verdicts(ablation: Ablation) -> Html:
    analysis = ablation.analysis
    compared = compared_budget(analysis)
    rows, said = [], []
    for name, variant in analysis["variants"].items():
        edits = ", ".join(_edits(variant.get("edits") or {}))
        shown = join([tag("strong", name), paragraph(edits, class_="note") if edits else ""])
        difference = variant.get("difference")
        if name == analysis["reference"]:
            difference = None
        rows.append(
            [shown, *_verdict(variant, difference, name == analysis["reference"], compared)]
        )
        if difference:
            notes = "; ".join([difference["text"], *difference.get("notes", ())])
            said.append(tag("li", tag("strong", name), f": {notes}"))
    smallest = analysis.get("smallest_effect")
    metric = analysis["metric"].replace("val_", "held-out ").replace("_", " ")
    note = (
        f"{metric[:1].upper()}{metric[1:]}; lower is better. Differences are paired by seed, with "
        "t intervals whose variance is pooled over variants; p is corrected for the number of "
        "variants (Holm)."
    )
    if len(analysis["budgets"]) > 1:
        note = f"At {_amount(compared)} {analysis['hold'].replace('_', ' ')}. {note}"
    if smallest:
        note += f" Differences under {smallest:g} are held not to matter."
    left = (analysis.get("pooled") or {}).get("left_out") or {}
    note += "".join(f" Not in the pooled variance: {name} ({why})." for name, why in left.items())
    headings = ["variant", "verdict", "difference", "95 % interval", "p (Holm)", "mean", "seeds",
                "more needed"]  # fmt: skip
    listed = table(headings, rows, label=f"Against {analysis['reference']}", text_columns=(0, 1),
                   note=note)  # fmt: skip
    words = tag("ul", *said, class_="said") if said else Html("")
    if len(said) > MOST_SENTENCES:
        words = details("Each verdict as a sentence", words)
    return join([listed, words])


def _edits(edits: Mapping[str, Any], above: str = "") -> list[str]:
    """Edits of the base, a line a field, whole blocks field by field."""
    found = []
    for name, value in edits.items():
        if isinstance(value, Mapping):
            found += _edits(value, f"{above}{name}.")
        else:
            found.append(f"{above}{name} = {value}")
    return found


def _verdict(
    variant: Mapping[str, Any], difference: Mapping[str, Any] | None, reference: bool, compared: Any
) -> list[Any]:
    """The cells of one variant, from its verdict on, at the budget that is compared."""
    points = [point for point in variant["by_budget"] if point["budget"] == compared]
    own = [number(points[0]["mean"]), str(points[0]["n"])] if points else [UNKNOWN, "0"]
    if difference is None:
        word = badge("reference" if reference else "no result", "plain")
        return [word, UNKNOWN, UNKNOWN, UNKNOWN, *own, UNKNOWN]
    verdict = difference["verdict"]
    return [
        badge(verdict, ablation_charts.KINDS.get(verdict, "plain")),
        number(difference["mean"], "+.4f"),
        between(difference["interval"], "+.4f"), p_value(difference.get("p_holm")), *own,
        _more_seeds(difference) if verdict == "cannot tell" else UNKNOWN,
    ]  # fmt: skip


def _more_seeds(difference: Mapping[str, Any]) -> str:
    """How many seeds more a verdict takes; beyond what is practical only that it is so."""
    needed = difference.get("seeds_needed")
    if needed is None:
        return UNKNOWN
    return str(needed) if needed <= PRACTICAL_SEEDS else f"over {PRACTICAL_SEEDS}"


def _by_budget(ablation: Ablation) -> Html:
    rows = []
    for name, variant in ablation.analysis["variants"].items():
        for entry in variant.get("by_budget", ()):
            failures = len(entry.get("failures") or ())
            rows.append([
                name, _amount(entry.get("budget")), str(entry.get("n", 0)),
                str(failures) if failures else UNKNOWN, number(entry.get("mean")),
                number(entry.get("sd"), ".2g"), between(entry.get("interval")),
                _si(entry.get("tokens")), _si(entry.get("flops")),
                text.duration(entry["seconds"]) if entry.get("seconds") is not None else UNKNOWN,
                text.dollars(entry["dollars"]) if entry.get("dollars") is not None else UNKNOWN,
            ])  # fmt: skip
    headings = ["variant", "budget", "seeds", "failed", "mean", "sd", "95 % interval", "tokens",
                "FLOP", "device time", "dollars"]  # fmt: skip
    note = "What one run used; means over seeds."
    return table(headings, rows, label="Each variant at each budget", note=note)


def _amount(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if float(value).is_integer() and value < 1e9 else f"{value:,g}"
    return str(value)


def _si(value: float | None) -> str:
    return UNKNOWN if value is None else text.si(value)


def _multipliers(ablation: Ablation) -> Html:
    multipliers = ablation.analysis.get("multipliers") or {}
    rows: list[list[Any]] = []
    reasons: dict[str, list[str]] = {}
    for name, by_unit in multipliers.items():
        cells = []
        for unit, (shown, _) in ablation_charts.UNITS.items():
            found = by_unit.get(unit) or {}
            cells.append(_times(found))
            if found.get("why"):
                reasons.setdefault(found["why"], []).append(f"{name} in {shown}")
        rows.append([name, *cells])
    if not rows:
        return Html("")
    if all(cell == UNKNOWN for row in rows for cell in row[1:]):
        return paragraph(f"There are no multipliers: {'; '.join(reasons)}.")
    reference = ablation.analysis["reference"]
    note = (
        f"Above 1: reaches {reference}'s loss with so many times less; read off curves fitted over "
        "the budgets, with 95 % intervals."
    )
    headings = ["variant", *(shown for shown, _ in ablation_charts.UNITS.values())]
    listed = table(headings, rows, label="Multipliers", note=note)
    items = [tag("li", f"{', '.join(cells)}: {why}") for why, cells in reasons.items()]
    return join([listed, details("Why some are missing", tag("ul", *items)) if items else ""])


def _times(found: Mapping[str, Any]) -> str:
    """A multiplier, or the bound of one that lies beyond the ladder."""
    if found.get("value") is not None:
        return f"{found['value']:.2f} ({between(found['interval'], '.2f')})"
    if found.get("bound") == "above":
        return f"above {found['interval'][0]:.2f}"
    if found.get("bound") == "below":
        return f"below {found['interval'][1]:.2f}"
    return UNKNOWN


def _health(ablation: Ablation) -> Html:
    rows = []
    for name, variant in ablation.analysis["variants"].items():
        health = variant.get("health") or {}
        if health.get("max_violation") is None:
            continue
        layers = [x for x in health.get("max_violation_by_layer") or [] if x is not None]
        against = health.get("max_violation_difference") or {}
        verdict = against.get("verdict")
        rows.append([
            name, number(health["max_violation"], ".3f"),
            between(health.get("max_violation_interval"), ".3f"),
            badge(verdict, ablation_charts.KINDS.get(verdict, "plain")) if verdict else UNKNOWN,
            number(max(layers), ".3f") if layers else UNKNOWN,
            number(health.get("dropped_share"), ".2%"),
        ])  # fmt: skip
    if not rows:
        return Html("")
    return table(
        ["variant", "MaxVio", "95 % interval", f"against {ablation.analysis['reference']}",
         "worst layer", "dropped"],
        rows, label="Balance at the end", text_columns=(0, 3),
        note="Means over seeds; lower is better. By layer below.",
    )  # fmt: skip


def _rates(ablation: Ablation) -> Html:
    rows = []
    for name, variant in ablation.analysis["variants"].items():
        rate = variant.get("learning_rate")
        if not rate or not rate.get("tried"):
            continue
        edge = badge("at the edge", "unsure") if rate.get("at_edge") else "inside"
        tried = ", ".join(f"{lr:g}: {number(value)}" for lr, value in rate["tried"])
        rows.append([name, number(rate["chosen"], "g"), edge, tried])
    if not rows:
        return Html("")
    return table(["variant", "chosen", "bracket", "tried: metric"], rows,
                 label="Learning rate of each variant", text_columns=(0, 2, 3))  # fmt: skip


def _bill(ablation: Ablation) -> Html:
    bill = ablation.analysis["bill"]
    entries = [("planned", bill.get("planned")), ("spent, all in", bill.get("spent"))]
    emphasis = [i for i, (_, entry) in enumerate(entries) if entry is not None][-1:]
    if any((bill.get("calibration") or {}).values()):
        entries.append(("of it calibration", bill["calibration"]))
    entries += [("of it tuning", bill.get("tuning")), ("of it failed cells", bill.get("failed"))]
    entries += [(f"of it {name}", entry) for name, entry in (bill.get("by_variant") or {}).items()]
    rows = []
    for label, entry in entries:
        dollars, hours = amounts(entry)
        if entry is not None:
            rows.append([label, UNKNOWN if dollars is None else text.dollars(dollars),
                         number(hours, ".3g")])  # fmt: skip
    return table(["", "dollars", "device-hours"], rows, label="Planned and spent",
                 emphasis=emphasis) if rows else Html("")  # fmt: skip


def _failures(ablation: Ablation) -> Html:
    rows = [
        [cell["id"], cell["variant"], str(cell["seed"]), _amount(cell["budget"]), cell["error"]]
        for cell in ablation.analysis["failed"]
    ]
    if not rows:
        return paragraph("No cell failed.")
    return table(["cell", "variant", "seed", "budget", "error"], rows, label="Failed cells",
                 text_columns=(0, 1, 4))  # fmt: skip


def _cells(ablation: Ablation) -> Html:
    rows = []
    if not ablation.cells:
        return Html("")
    for cell in ablation.cells:
        kind = "plain" if cell["status"] == "completed" else "bad"
        rate = cell.get("learning_rate")
        rows.append([
            cell["id"], cell.get("variant", ""), badge(cell["status"], kind), cell.get("kind", ""),
            _amount(cell.get("seed")), _amount(cell.get("budget")), number(rate, "g"),
            _amount(cell.get("steps")), number(cell.get("val_bits_per_byte")),
            UNKNOWN if cell.get("dollars") is None else text.dollars(cell["dollars"]),
        ])  # fmt: skip
    headings = ["cell", "variant", "status", "kind", "seed", "budget", "learning rate", "steps",
                "bits per byte", "dollars"]  # fmt: skip
    listed = table(headings, rows, label="Cells", text_columns=(0, 1, 2, 3))
    return listed if len(rows) <= MOST_CELLS else details(f"All {len(rows)} cells", listed)


def _card(subject: Subject, groups: Mapping[str, Sequence[RunRecord]]) -> Html:
    reference = _ablation(subject).analysis["reference"]
    members = groups.get(reference) or subject.runs
    if not members:
        return Html("")
    run = members[0]
    note = f"Of {run.name}; variants differ from it as the verdicts say."
    return join([paragraph(note, class_="note"), card.model_card(run)])


def _again(subject: Subject, ablation: Ablation) -> Html:
    place = shlex.quote(str(subject.paths[0]))
    command = ablation.about.get("command")
    if isinstance(command, list):
        command = shlex.join(command)
    commands = [command] if command else []
    return card.reproduction(subject.runs, [*commands, f"moejax report {place}"])
