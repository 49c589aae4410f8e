"""``moejax evaluate`` on a terminal: tables of what its ``evaluate.json`` holds."""

from collections.abc import Mapping
from typing import Any

from moejax.cost.text import columns

HEADINGS = (
    "domain", "documents", "tokens", "bytes", "bits/byte", "interval 95 %", "unigram", "gzip -9",
)  # fmt: skip


def format_evaluation(result: Mapping[str, Any]) -> str:
    """The tables, as text for people.

    Args:
      result: what ``moejax.analysis.evaluate.evaluate`` returns.
    """
    batches, total = result["batches"], result["total"]
    part = "" if batches["run"] == batches["of"] else (
        f", {batches['run']} of {batches['of']} batches"
    )  # fmt: skip
    kind = f" by {result['kind']}" if result["kind"] else f"; no domains: {result['why']}"
    rows = [_row(domain) for domain in [*result["domains"], total]]
    lines = [
        f"checkpoint of step {result['step']}, {total['nats_per_token']:.4f} nats/token{part}",
        f"\nheld-out text{kind}; intervals over documents",
        columns([HEADINGS, *rows]),
        *(f"warning     {text}" for text in result["leaks"]),
        *_tasks(result["lm_eval"]),
        f"\n{result['output']}",
    ]
    return "\n".join(lines)


def _row(domain: Mapping[str, Any]) -> tuple[str, ...]:
    interval = domain["interval"]
    return (
        domain["name"], f"{domain['documents']:,}", f"{domain['tokens']:,}",
        f"{domain['bytes']:,}", f"{domain['bits_per_byte']:.4f}",
        "one document" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
        f"{domain['unigram']:.4f}", f"{domain['gzip']:.4f}",
    )  # fmt: skip


def _tasks(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    rows = [("task", "samples", "few-shot", "metric", "value", "standard error")]
    for name, task in found["tasks"].items():
        for metric, value in task["metrics"].items():
            error = value["stderr"]
            rows.append((
                name, _shown(task["samples"], "d"), _shown(task["few_shot"], ""), metric,
                _shown(value["value"], ".4f"), _shown(error, ".4f"),
            ))  # fmt: skip
    limit = "" if found["limit"] is None else f", the first {found['limit']} samples of each"
    heading = f"\nlm-evaluation-harness {found['version']}{limit}"
    return [heading, columns(rows)]


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
