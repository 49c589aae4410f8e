"""A short table of a folder of results: ``python -m moejax.bench.summary DIR``."""

import json
import pathlib
import sys
from typing import Any

from moejax.bench.tables import PASS_NAMES, Column, format_table

# Of the MoE layer only forward + backward is shown, of a model only the whole training step.
HIDDEN = {"moe": "forward", "model": "forward_backward"}


def summarize(folder: pathlib.Path) -> str:
    """One line a measurement, or a training run, of every ``*.json`` in the folder, by name.

    A file without either, of a job that failed for example, is named.
    """
    rows: list[dict[str, Any]] = []
    missing = []
    for file in sorted(folder.glob("*.json")):
        try:
            rows += _rows(file.stem, json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError):
            missing.append(f"{file.name}: no results")
    table = [format_table(rows, COLUMNS)] if rows else []
    return "\n".join([*table, *missing])


def _rows(name: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of one file: rows of ``moejax bench``, or the summary of ``moejax train``."""
    if "tokens_per_second" in record:
        run = {"shape": {"name": name}, "dispatch": record["dispatch"], "pass": record["status"]}
        return [{**run, "tokens_per_s": record["tokens_per_second"], "mfu": record["mfu"]}]
    return [r for r in record["results"] if "ms" in r and r["pass"] != HIDDEN.get(r["suite"])]


def _number(name: str, key: str, form: str, scale: float = 1.0) -> Column:
    return name, lambda r: format(r[key] * scale, form) if r.get(key) else ""


COLUMNS: list[Column] = [
    ("shape", lambda r: r["shape"]["name"]),
    ("load", lambda r: r.get("load") or ""),
    ("what", lambda r: r["dispatch"]),
    ("pass", lambda r: PASS_NAMES.get(r["pass"], r["pass"])),
    ("ms", lambda r: format(r["ms"]["median"], ".4g") if "ms" in r else ""),
    _number("TFLOP/s", "flops_per_s", ".3g", 1e-12),
    _number("GB/s", "bytes_per_s", ".4g", 1e-9),
    _number("of experts", "share_of_experts", ".1%"),
    _number("x dense", "ratio_to_dense", ".2f"),
    _number("MFU", "mfu", ".1%"),
    _number("tokens/s", "tokens_per_s", ",.0f"),
]


if __name__ == "__main__":
    print(summarize(pathlib.Path(sys.argv[1])))
