"""The files of an ablation's folder, as far as the analysis reads them.

``ablation.json`` (what it is), ``plan.json`` (its cells and what they should cost) and
``results.jsonl`` (a line for every cell that ended). Run directories are not needed.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moejax.config import UserError

ABLATION, PLAN, RESULTS = "ablation.json", "plan.json", "results.jsonl"
ANALYSIS = "analysis.json"  # what ``moejax.analysis.ablation.analyse`` found
FORMAT = 1
UNITS = {  # of a budget, by what is held equal
    "tokens": "tokens", "flops": "FLOP", "device_seconds": "device-seconds", "dollars": "dollars",
}  # fmt: skip
MEASURED = ("final", "trunk", "branch")
COSTS = {  # of the whole path from step 0, as the analysis and the results name them
    "tokens": "tokens", "flops": "model_flops", "seconds": "train_seconds", "dollars": "dollars",
}  # fmt: skip
_IN_A_ROW = ("id", "variant", "seed", "budget", "kind", "status")
_NEEDED = ("name", "variants", "reference", "seeds", "budget")


@dataclasses.dataclass(frozen=True)
class Record:
    """An ablation as its folder has it.

    Attributes:
      path: the folder.
      spec: the resolved config.
      about: all of ``ablation.json``.
      plan: all of ``plan.json``; empty where it was not written yet.
      rows: the last result of each cell.
    """

    path: pathlib.Path
    spec: dict[str, Any]
    about: dict[str, Any]
    plan: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    @property
    def metric(self) -> str:
        """The compared field of the results; lower is better."""
        return self.spec.get("metric") or "val_bits_per_byte"

    @property
    def amounts(self) -> list[float]:
        """Budgets, rising."""
        return sorted(self.spec["budget"]["amounts"])

    def measured(self, variant: str, budget: float) -> Iterator[dict[str, Any]]:
        """Results of a variant at a budget, tuning left out."""
        for row in self.rows:
            if row["kind"] in MEASURED and row["variant"] == variant and row["budget"] == budget:
                yield row

    def completed(self, variant: str, budget: float, field: str = "") -> dict[int, dict[str, Any]]:
        """Results by seed, of cells that completed with a finite metric."""
        field = field or self.metric
        return {
            row["seed"]: row
            for row in self.measured(variant, budget)
            if row["status"] == "completed" and is_number(row.get(field))
        }

    def device(self) -> str | None:
        """What the cells ran on; None where no result says."""
        found = dict.fromkeys(row["device"] for row in self.rows if row.get("device"))
        return ", ".join(found) or None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean_of(values: list[Any]) -> float | None:
    """Mean of numbers; None where one is missing, so that no sum hides a gap."""
    return float(np.mean(values)) if values and all(map(is_number, values)) else None


def metric_values(record: Record, budget: float, field: str = "") -> dict[str, dict[int, float]]:
    """Metric by seed, by variant."""
    field = field or record.metric
    return {
        name: {seed: row[field] for seed, row in record.completed(name, budget, field).items()}
        for name in record.spec["variants"]
    }


def read_record(folder: str | pathlib.Path) -> Record:
    """Reads an ablation's folder.

    Raises:
      UserError: it is none, is of another format, is damaged, or no cell has ended yet.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise UserError(f"{str(path)!r}: is no folder; give the --workdir of `moejax ablate`")
    if not (path / ABLATION).is_file():
        raise UserError(
            f"{str(path)!r}: holds no {ABLATION}; give the --workdir of `moejax ablate`"
        )
    about = read_object(path / ABLATION)
    found = about.get("format", FORMAT)
    if found != FORMAT:
        raise UserError(
            f"{str(path / ABLATION)!r}: format = {found!r}, this moejax reads {FORMAT}; use the "
            "version that wrote it, or run the ablation again"
        )
    spec = about.get("spec")
    lacking = [name for name in _NEEDED if not isinstance(spec, dict) or name not in spec]
    if lacking:
        raise UserError(
            f"{str(path / ABLATION)!r}: the spec lacks {', '.join(lacking)}; restore the file, or "
            "run the ablation again"
        )
    if not _is_sound(spec):
        raise UserError(
            f"{str(path / ABLATION)!r}: the spec is damaged (its variants, reference or budget); "
            "restore the file, or run the ablation again"
        )
    plan = read_object(path / PLAN) if (path / PLAN).is_file() else {}
    rows = {row["id"]: row for row in read_rows(path / RESULTS, _IN_A_ROW)}
    if not rows:
        raise UserError(
            f"{str(path)!r}: no cell of the ablation has ended yet; let `moejax ablate` run first"
        )
    return Record(path, spec, about, plan, tuple(rows.values()))


def _is_sound(spec: dict[str, Any]) -> bool:
    """Whether the spec has variants, the reference among them, and amounts."""
    variants, budget = spec["variants"], spec["budget"]
    amounts = budget.get("amounts") if isinstance(budget, dict) else None
    return (
        isinstance(variants, dict)
        and spec["reference"] in variants
        and isinstance(amounts, list)
        and bool(amounts)
        and all(map(is_number, amounts))
    )


def read_object(path: pathlib.Path, remedy: str = "run the ablation again") -> dict[str, Any]:
    """The object in one of the files.

    Raises:
      UserError: it is missing or damaged; ``remedy`` is what else than to restore it would help.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(path)!r}: cannot be read ({error}); restore the file, or {remedy}"
        ) from None
    return values


def read_rows(path: pathlib.Path, needed: Sequence[str] = ("id", "status")) -> list[dict[str, Any]]:
    """The lines of ``results.jsonl``; one that a kill tore is left out, and no file has none.

    Args:
      path: the file.
      needed: fields of every line.

    Raises:
      UserError: another line is damaged.
    """
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            for name in needed:
                row[name]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{str(path)!r}: line {number} is damaged; delete it, and its cell runs again"
            ) from None
        rows.append(row)
    return rows
