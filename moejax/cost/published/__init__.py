"""Bills that others published, rebuilt: what reproduces, and where not, why.

One small module for each bill. ``experiments/published`` holds a file for each with ``get_bill()``,
and a file of one's own in that form works as well: ``moejax plan --published=FILE``.
"""

from collections.abc import Callable
from typing import Any

from moejax.config import check, nearest, run_file
from moejax.cost.published import (
    deepseek_moe,
    deepseek_r1,
    deepseek_r1_zero,
    deepseek_v2,
    deepseek_v3,
    gpt3,
    llama2_70b,
    llama3_1,
    olmoe,
)
from moejax.cost.published.figures import Bill, Figure

__all__ = ["ALL", "BILLS", "Bill", "Figure", "find", "published"]

ALL = "all"
BILLS: dict[str, Callable[[], Bill]] = {
    "deepseek_v3": deepseek_v3.bill,
    "deepseek_r1_zero": deepseek_r1_zero.bill,
    "deepseek_r1": deepseek_r1.bill,
    "deepseek_v2": deepseek_v2.bill,
    "deepseek_moe": deepseek_moe.bill,
    "olmoe": olmoe.bill,
    "llama3_1": llama3_1.bill,
    "llama2_70b": llama2_70b.bill,
    "gpt3": gpt3.bill,
}


def find(which: str) -> list[Bill]:
    """The bills that a name means.

    Args:
      which: a bill's name, ``all``, or a Python file with ``get_bill()``.

    Raises:
      ConfigError: no such bill.
      UserError: a file that cannot be used.
    """
    if which == ALL:
        return [bill() for bill in BILLS.values()]
    if which.endswith(".py"):
        found = run_file(which, "get_bill", "--published")
        check(isinstance(found, Bill), "--published", which, "get_bill() must return a Bill")
        return [found]
    known = which in BILLS
    check(known, "--published", which, f"no such bill; {nearest(which, [*BILLS, ALL])}")
    return [BILLS[which]()]


def published(which: str) -> dict[str, Any]:
    """``moejax plan --published --format=json``.

    Returns:
      ``bills``, and in ``summary`` how many figures are derived, reproduced of these, echoed and
      implied: only derived ones prove anything.

    Raises: see ``find``.
    """
    bills = find(which)
    figures = [figure for bill in bills for figure in bill.figures]
    count = lambda kind: sum(figure.kind == kind for figure in figures)
    return {
        "bills": [bill.to_dict() for bill in bills],
        "summary": {
            "derived": count("derived"),
            "reproduced": sum(f.kind == "derived" and bool(f.reproduced) for f in figures),
            "echoed": count("echoed"),
            "implied": count("implied"),
        },
    }
