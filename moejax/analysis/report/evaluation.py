"""What ``moejax evaluate`` found of a run: bits per byte by domain, tasks of the harness."""

from collections.abc import Mapping
from typing import Any

from moejax.analysis.report.html import (
    UNKNOWN,
    Html,
    between,
    details,
    join,
    number,
    paragraph,
    table,
)

MOST_ROWS = 16  # of tasks; beyond, they are folded away


def evaluation(result: Mapping[str, Any] | None) -> Html:
    """The tables of an evaluation.

    Args:
      result: what ``evaluate.json`` holds; None where there is none.
    """
    if result is None:
        return Html("")
    batches, loss = result["batches"], number(result["total"]["nats_per_token"])
    part = "" if batches["run"] == batches["of"] else (
        f", on {batches['run']:,} of {batches['of']:,} held-out batches"
    )  # fmt: skip
    lead = f"Checkpoint of step {result['step']:,}, {loss} nats per token{part}."
    return join([
        paragraph(lead, class_="note"), _domains(result), _tasks(result["lm_eval"]),
    ])  # fmt: skip


def _domains(result: Mapping[str, Any]) -> Html:
    """A row a domain, and all of the text below them."""
    rows = []
    for domain in [*result["domains"], result["total"]]:
        interval = domain["interval"]
        rows.append([
            domain["name"], f"{domain['documents']:,}", f"{domain['tokens']:,}",
            number(domain["bits_per_byte"]),
            "one document" if interval is None else between(interval),
            number(domain["unigram"]), number(domain["gzip"]),
        ])  # fmt: skip
    label = f"Held-out text by {result['kind']}" if result["kind"] else "Held-out text"
    note = (
        "Bits per byte; lower is better. Intervals are over documents. Unigram counts and gzip -9 "
        "are of the whole held-out text of each row."
    )
    if not result["domains"] and result["why"]:
        note += f" No domains: {result['why']}."
    headings = ["domain", "documents", "tokens", "bits per byte",
                f"{100 * result['confidence']:g} % interval", "unigram", "gzip -9"]  # fmt: skip
    return table(headings, rows, label=label, note=note, emphasis=[len(rows) - 1])


def _tasks(found: Mapping[str, Any] | None) -> Html:
    """Metrics of lm-evaluation-harness, a row each."""
    if found is None:
        return Html("")
    rows = [
        [name, _shown(task["samples"]), _shown(task["few_shot"]), metric, number(value["value"]),
         number(value["stderr"])]
        for name, task in found["tasks"].items() for metric, value in task["metrics"].items()
    ]  # fmt: skip
    note = f"Version {found['version']}, at most {found['max_length']:,} tokens at once"
    if found["limit"] is not None:
        note += f", only the first {found['limit']:,} samples of each task"
    listed = table(
        ["task", "samples", "few-shot", "metric", "value", "standard error"], rows,
        label="Tasks of lm-evaluation-harness", text_columns=(0, 3), note=f"{note}.",
    )  # fmt: skip
    return listed if len(rows) <= MOST_ROWS else details(f"All {len(rows)} results", listed)


def _shown(value: Any) -> str:
    """A count; a dash where the harness gives none, as for some groups."""
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else str(value)
