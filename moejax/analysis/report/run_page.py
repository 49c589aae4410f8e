"""Sections of a report on one run."""

from collections.abc import Mapping
from typing import Any

from moejax.analysis import inspect_text
from moejax.analysis.report import card, learning, money, routing
from moejax.analysis.report.charts import Chart
from moejax.analysis.report.evaluation import evaluation
from moejax.analysis.report.gather import RunRecord, Subject
from moejax.analysis.report.html import UNKNOWN, Html, badge, details, join, paragraph, table, tag
from moejax.analysis.report.page import Section
from moejax.analysis.report.svg import gallery
from moejax.cost import text

MOST_EXPERTS, MOST_TOKENS = 4, 6


def opening(subject: Subject) -> Html:
    """The run in a sentence and in cards."""
    run = subject.runs[0]
    summary = run.summary or {}
    moe = run.config.model.moe
    model = "a dense model" if moe is None else (
        f"{moe.num_experts} experts, {moe.top_k} a token, router {moe.router.name}"
    )  # fmt: skip
    status = summary.get("status", "unfinished")
    kind = {"completed": "good", "budget": "good"}.get(status, "bad")
    step = summary.get("step", run.curves.rows[-1]["step"] if run.curves.rows else 0)
    lead = tag(
        "p", badge(status, kind), f" after {step:,} steps: {model}; text from "
        f"{run.record['data'].get('source', run.config.data.source)}"
        f"{_sources(run.record['data'])}.", class_="lead",
    )  # fmt: skip
    return join([lead, cards(_figures(subject, run, summary))])


def _sources(data: Mapping[str, Any]) -> str:
    """The labels of a mixture's sources; empty for a single corpus."""
    sources = data.get("sources")
    return f" of {', '.join(sources)}" if isinstance(sources, Mapping) else ""


def cards(figures: list[tuple[str, str, str]]) -> Html:
    """Key figures: name, value and, below, what to compare it with."""
    items = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", more) if more else ""))
        for name, value, more in figures
    ]
    return tag("dl", *items, class_="cards")


def _figures(subject: Subject, run: RunRecord, summary: Mapping[str, Any]):
    found = []
    if summary.get("val_bits_per_byte") is not None:
        names = {"gzip": "gzip -9", "unigram": "unigram"}
        base = [f"{shown} {summary['baselines'][name]:.3f}" for name, shown in names.items()
                if name in summary.get("baselines", {})]  # fmt: skip
        found.append(("held out, bits per byte", f"{summary['val_bits_per_byte']:.4f}",
                      ", ".join(base)))  # fmt: skip
    if summary.get("val_loss") is not None and summary.get("loss") is not None:
        found.append(("held out, nats per token", f"{summary['val_loss']:.4f}",
                      f"training {summary['loss']:.4f}"))  # fmt: skip
    if subject.bill is not None:
        all_in, ran = subject.bill["total"]["all_in"], subject.bill["runs"][0]
        found += [
            ("all in", text.dollars(all_in["dollars"]),
             f"{all_in['device_hours']:.3g} device-hours on {ran['devices']} {ran['device']}"),
            ("tokens trained", text.si(all_in["tokens"]), text.si(all_in["model_flops"], "FLOP")),
        ]  # fmt: skip
        if ran["mfu"] is not None:
            found.append(("MFU", text.percent(ran["mfu"]),
                          f"of {text.si(ran['peak_flops'], 'FLOP/s')}; goodput "
                          f"{text.percent(ran['goodput'])}"))  # fmt: skip
        found.append(("energy", text.energy(all_in["energy_kwh"]), text.carbon(all_in["co2_kg"])))
    last = run.curves.rows[-1] if run.curves.rows else {}
    if last.get("router/max_violation") is not None:
        found.append(("MaxVio, last step", f"{last['router/max_violation']:.3f}",
                      f"dropped {last['router/dropped_share']:.2%}, dead "
                      f"{last['router/dead_experts']}"))  # fmt: skip
    return found


def sections(subject: Subject) -> tuple[list[Section], list[Chart]]:
    """The sections, and the figures in them."""
    run = subject.runs[0]
    curves, routers = learning.run_charts(run), routing.over_time(run)
    looked = [] if run.inspection is None else routing.inspected(run.inspection)
    made = [
        Section("bill", "The bill", money.bill(subject.bill)),
        Section("learning", "Learning", join([
            paragraph(learning.note(run), class_="note"), gallery(curves),
        ]) if curves else Html("")),
        Section("evaluation", "Evaluation", evaluation(run.evaluation)),
        Section("balance", "Routers over training", join([
            paragraph("Of training batches, as logged.", class_="note"), gallery(routers),
        ]) if routers else Html("")),
        Section("routing", "Routers on held-out text", inspection(run, looked)),
        Section("card", "Model card", card.model_card(run)),
        Section("again", "Commands, versions, fingerprints",
                card.reproduction([run], card.run_commands(run))),
    ]  # fmt: skip
    return made, [*curves, *routers, *looked]


def inspection(run: RunRecord, charts: list[Chart]) -> Html:
    """What ``moejax inspect`` found: figures, measures by layer, tokens of experts, gaps."""
    result = run.inspection
    if result is None:
        return Html("")
    gaps = [tag("li", f"{name.replace('_', ' ')}: {why}") for name, why in
            result["left_out"].items()]  # fmt: skip
    return join([
        paragraph(
            f"Checkpoint of step {result['step']:,}, {result['tokens']:,} held-out tokens, "
            f"{result['loss']:.4f} nats per token.", class_="note",
        ),
        gallery(charts),
        by_layer(result), _tokens(result),
        join([tag("h3", "Left out"), tag("ul", *gaps)]) if gaps else "",
    ])  # fmt: skip


def by_layer(result: Mapping[str, Any]) -> Html:
    """The measures of an inspection, a row a layer."""
    made = []
    for label, measures in (
        ("Load by layer", inspect_text.LOAD), ("Routers and experts by layer", inspect_text.ROUTER),
    ):  # fmt: skip
        own = {name: shown for name, shown in measures.items() if name in result["by_layer"]}
        rows = []
        for i, layer in enumerate(result["layers"]):
            values = [(result["by_layer"][name][i], form) for name, (_, form) in own.items()]
            rows.append([layer, *(UNKNOWN if v is None else format(v, form) for v, form in values)])
        headings = ["layer", *(heading for heading, _ in own.values())]
        made.append(table(headings, rows, label=label))
    return join(made)


def visible(token: str) -> str:
    """A token with its white space to be seen."""
    body = token.strip(" ")
    before = len(token) - len(token.lstrip(" "))
    after = len(token) - before - len(body) if body else 0
    spaces = lambda count: "␣" * count if count <= 3 else f"␣{count} "
    lines = body.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    return f"{spaces(before)}{lines}{spaces(after)}".strip()


def _tokens(result: Mapping[str, Any]) -> Html:
    """Of each layer, the experts that are surest of their input tokens."""
    vocabulary = result.get("vocabulary")
    if vocabulary is None:
        return Html("")
    rows = []
    for i in routing.shown(len(result["layers"])):
        experts = vocabulary["input"][i]
        sure = lambda e, experts=experts: (
            -sum(s for _, s, _ in experts[e]) / max(len(experts[e]), 1)
        )
        for e in sorted(range(len(experts)), key=sure)[:MOST_EXPERTS]:
            tokens = join(
                [join([tag("span", visible(written), class_="token"), f" {share:.0%}"])
                 for written, share, _ in experts[e][:MOST_TOKENS]],
                "   ",
            )  # fmt: skip
            rows.append([result["layers"][i], e, tokens or "none"])
    listed = table(
        ["layer", "expert", "tokens, and the share of their occurrences"], rows,
        label="Tokens of experts", text_columns=(0, 1, 2),
        note=f"Input tokens that occur {vocabulary['min_count']} times at least.",
    )  # fmt: skip
    return details("Which tokens go to which experts", listed, open_=len(rows) <= 16)
