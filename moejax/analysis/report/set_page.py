"""Sections of a report on several runs: groups that differ in their seed, side by side."""

import shlex
from collections.abc import Mapping, Sequence

import numpy as np

from moejax.analysis.report import card, learning, money, routing, run_page
from moejax.analysis.report.charts import Chart
from moejax.analysis.report.gather import RunRecord, Subject
from moejax.analysis.report.html import (
    UNKNOWN,
    Html,
    badge,
    between,
    details,
    join,
    number,
    paragraph,
    table,
)
from moejax.analysis.report.page import Section
from moejax.analysis.report.svg import gallery
from moejax.analysis.statistics import mean_interval
from moejax.cost import text

MOST_EDITS = 4  # of a group's name

Groups = dict[str, list[RunRecord]]


def groups_of(runs: Sequence[RunRecord]) -> Groups:
    """Runs by config, the seed aside; a group's name says how it differs from the first."""
    found: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        found.setdefault(tuple(card.edits(runs[0].config, run.config)), []).append(run)
    if len(found) == 1:
        return {"all runs": list(runs)}
    named: Groups = {}
    for edits, members in found.items():
        shown = [_short(line) for line in edits[:MOST_EDITS]]
        more = [f"and {len(edits) - MOST_EDITS} more"] if len(edits) > MOST_EDITS else []
        name = ", ".join(shown + more) or f"as {members[0].name}"
        named[name if name not in named else f"{name} ({members[0].name})"] = members
    return named


def _short(line: str) -> str:
    """``router.name ('a' -> 'b')`` as ``router.name 'b'``."""
    name, _, values = line.partition(" (")
    return f"{name} {values[:-1].rpartition(' -> ')[2]}"


def opening(subject: Subject) -> Html:
    """The runs in a sentence and in cards."""
    groups = groups_of(subject.runs)
    seeds = sorted({run.config.seed for run in subject.runs})
    lead = paragraph(
        f"{len(subject.runs)} runs of {len(groups)} config{'' if len(groups) == 1 else 's'}, "
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}.", class_="lead",
    )  # fmt: skip
    figures = []
    best = min((value for value in map(bits, subject.runs) if value is not None), default=None)
    if best is not None:
        figures.append(("best run held out, bits per byte", f"{best:.4f}", ""))
    if subject.bill is not None:
        total = subject.bill["total"]
        all_in = total["all_in"]
        figures += [
            ("all in", text.dollars(all_in["dollars"]),
             f"headline {text.dollars(total['headline']['dollars'])}"),
            ("device-hours", f"{all_in['device_hours']:.3g}", f"{all_in['runs']} runs billed"),
            ("tokens trained", text.si(all_in["tokens"]), text.si(all_in["model_flops"], "FLOP")),
            ("energy", text.energy(all_in["energy_kwh"]), text.carbon(all_in["co2_kg"])),
        ]  # fmt: skip
    return join([lead, run_page.cards(figures)])


def bits(run: RunRecord) -> float | None:
    """Held-out bits per byte at the end of a run; None where it was not measured."""
    return (run.summary or {}).get("val_bits_per_byte")


def sections(subject: Subject) -> tuple[list[Section], list[Chart]]:
    """The sections, and the figures in them."""
    groups = groups_of(subject.runs)
    kept = best_groups(groups)
    charts = learning.group_charts(kept, what="config", order=list(groups))
    said = ""
    if len(kept) < len(groups):
        said = f"Of {len(groups)} configs, the {len(kept)} with the lowest held-out loss are drawn."
    looked, drawn = inspections({run.name: run for run in subject.runs})
    place = " ".join(shlex.quote(str(path)) for path in subject.paths)
    made = [
        Section("results", "Results", join([_by_group(groups), _runs(subject)])),
        Section("learning", "Learning", join([
            paragraph(said, class_="note") if said else "", gallery(charts),
        ]) if charts else Html("")),
        Section("bill", "The bill", money.bill(subject.bill)),
        Section("routing", "Routers on held-out text", looked),
        Section("card", "Model card", join([
            paragraph(f"Of {subject.runs[0].name}; the others differ as the results say.",
                      class_="note"),
            card.model_card(subject.runs[0]),
        ])),
        Section("again", "Commands, versions, fingerprints",
                card.reproduction(subject.runs, [f"moejax report {place}"])),
    ]  # fmt: skip
    return made, [*charts, *drawn]


def best_groups(groups: Groups, always: str = "") -> Groups:
    """At most as many groups as a figure can show: the lowest held-out losses, and one by name."""
    if len(groups) <= learning.MOST_GROUPS:
        return groups
    mean = lambda name: np.mean([b for b in map(bits, groups[name]) if b is not None] or [np.inf])
    kept = sorted(groups, key=lambda name: (name != always, mean(name)))[: learning.MOST_GROUPS]
    return {name: runs for name, runs in groups.items() if name in kept}


def _by_group(groups: Groups) -> Html:
    rows = []
    for name, runs in groups.items():
        values = [value for value in map(bits, runs) if value is not None]
        mean, sd, interval = mean_interval(np.array(values)) if values else (None, None, None)
        shown = "one seed" if len(values) == 1 else between(interval)
        rows.append([name, len(runs), len(runs) - len(values), number(mean), number(sd), shown])
    return table(
        ["config", "runs", "unfinished", "bits per byte", "sd", "95 % interval"], rows,
        label="Held-out bits per byte by config",
        note="Mean over seeds with its t interval. Several configs side by side invite chance: for "
        "a verdict, moejax ablate compares them by seed and corrects for their number.",
    )  # fmt: skip


def _runs(subject: Subject) -> Html:
    billed = {} if subject.bill is None else {r["path"]: r for r in subject.bill["runs"]}
    rows = []
    for run in subject.runs:
        own, summary = billed.get(str(run.path)), run.summary or {}
        status = summary.get("status", "unfinished")
        rows.append([
            run.name, badge(status, "plain" if status == "completed" else "bad"), run.config.seed,
            f"{summary.get('step', 0):,}", number(bits(run)), number(summary.get("loss")),
            UNKNOWN if own is None else text.si(own["model_flops"]),
            UNKNOWN if own is None else text.dollars(own["dollars"]),
        ])  # fmt: skip
    headings = ["run", "status", "seed", "steps", "bits per byte", "training loss", "FLOP",
                "dollars"]  # fmt: skip
    listed = table(headings, rows, label="Runs", text_columns=(0, 1))
    return listed if len(rows) <= 12 else details(f"All {len(rows)} runs", listed)


def inspections(runs: Mapping[str, RunRecord], most: int = 6) -> tuple[Html, list[Chart]]:
    """What was measured of the routers of some runs, folded, and the figures in it.

    Args:
      runs: by what to call them.
      most: how many at most.
    """
    seen = [(name, run) for name, run in runs.items() if run.inspection is not None][:most]
    parts, charts = [], []
    for place, (name, run) in enumerate(seen):
        own = routing.inspected(run.inspection, prefix=f"{place}-")
        charts += own
        parts.append(details(name, run_page.inspection(run, own), open_=len(seen) == 1))
    if not parts:
        return Html(""), []
    note = "As moejax inspect measured them; runs that it did not look at are left out."
    return join([paragraph(note, class_="note"), *parts]), charts
