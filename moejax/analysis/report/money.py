"""The bill of a report: the ledger's table and lines, and what dollars are worth on a CPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.analysis.report.html import Html, details, facts, join, table
from moejax.cost.bill_text import ledger_lines, ledger_rows

MOST_ROWS = 12  # of runs; beyond, the table of runs is folded away
CPU = (
    "Dollars were measured on a CPU: they rank CPU kernels, and say little of what the same would "
    "cost on an accelerator."
)


def bill(summary: Mapping[str, Any] | None) -> Html:
    """What the runs cost: headline against all-in, and what the difference is made of.

    Args:
      summary: ``moejax.cost.bill.summarize``'s result; None where there is no ledger.
    """
    if summary is None:
        return Html("")
    headings, *rows = ledger_rows(summary)
    runs = len(summary["runs"])
    own, sums = rows[:runs], [_sum(row) for row in rows[runs:]]
    rows = own + sums
    names = [str(heading) for heading in headings]
    note = (
        "Headline: runs marked final (*). All in: every run there was, failed and interrupted ones "
        "and tuning among them."
    )
    text_columns = (0, 1, 2, 3)
    made = []
    if runs <= MOST_ROWS:
        emphasis = range(runs, len(rows))
        made.append(table(names, rows, label="What it cost", text_columns=text_columns, note=note,
                          emphasis=emphasis))  # fmt: skip
    else:
        made.append(table(names, sums, label="What it cost", text_columns=text_columns, note=note,
                          emphasis=range(len(sums))))  # fmt: skip
        whole = table(names, own, label="Every run", text_columns=text_columns)
        made.append(details(f"All {runs} runs, one by one", whole))
    lines = [(label, " ".join(line.split())) for label, line in ledger_lines(summary)]
    plans = [line for line in lines if line[0] == "plan"]
    kept = [line for line in lines if line[0] != "plan"]
    if len(plans) <= 3:
        kept, plans = kept + plans, []
    made.append(facts(kept))
    if plans:
        made.append(details(f"Plan against bill, {len(plans)} runs", facts(plans)))
    return join(made)


def _sum(row: Sequence[str]) -> list[str]:
    """A subtotal with its name first and its number of runs where others have devices."""
    words = [cell for cell in row[:4] if cell]
    return [words[0], "", "", *words[1:], *row[4:]]


def on_accelerator(summary: Mapping[str, Any] | None) -> bool:
    """Whether every run was measured on something other than a CPU."""
    return summary is not None and all(run["device"] != "cpu" for run in summary["runs"])
