"""The files of an ablation's folder, as far as the analysis reads them.

``ablation.json`` (what it is), ``plan.json`` (its cells and what they should cost) and
``results.jsonl`` (a line for every cell that ended). Run directories are not needed.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

from moejax.config import UserError

ABLATION, PLAN, RESULTS = "ablation.json", "plan.json", "results.jsonl"
FORMAT = 1
MEASURED = ("final", "trunk", "branch")
COSTS = {  # of the whole path from step 0, as the analysis and the results name them
    "tokens": "tokens", "flops": "model_flops", "seconds": "train_seconds", "dollars": "dollars",
}  # fmt: skip
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
    about = _object(path / ABLATION)
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
    plan = _object(path / PLAN) if (path / PLAN).is_file() else {}
    rows = _rows(path / RESULTS)
    if not rows:
        raise UserError(
            f"{str(path)!r}: no cell of the ablation has ended yet; let `moejax ablate` run first"
        )
    return Record(path, spec, about, plan, tuple(rows))


def _object(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(path)!r}: cannot be read ({error}); restore the file, or run the ablation again"
        ) from None
    return values


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The last line of each cell; a torn last line is left out."""
    if not path.is_file():
        return []
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            for name in ("variant", "seed", "budget", "kind", "status"):
                row[name]
            found[row["id"]] = row
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{str(path)!r}: line {number} is damaged; delete it, and its cell runs again"
            ) from None
    return list(found.values())
