"""The README's table of routers: ``python -m moejax.moe.routers.table`` prints it."""

import re

from moejax.moe.routers.base import Router
from moejax.moe.routers.registry import REGISTRY

BEGIN = "<!-- routers: printed by python -m moejax.moe.routers.table -->"
END = "<!-- end of routers -->"

HEADER = ("`router.name`", "rule", "paper", "causal", "state", "use")


def table() -> str:
    """All routers of the registry as a Markdown table, one line each, in its order."""
    lines = [_line(HEADER), "|---" * len(HEADER) + "|"]
    return "\n".join([*lines, *(_line(_cells(name, kind)) for name, kind in REGISTRY.items())])


def _line(cells: tuple[str, ...]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _cells(name: str, kind: type[Router]) -> tuple[str, ...]:
    card = kind.card
    causal = "no" if kind.Options.leaks else "yes"
    return (f"`{name}`", card.rule, _linked(card.paper), causal, card.state, card.use)


def _linked(paper: str) -> str:
    """A paper with its arXiv number as a link: ``Switch, 2101.03961``."""
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    print(table())
