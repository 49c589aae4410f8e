"""What a report is about, read from folders: a run, a set of runs, or an ablation."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from moejax.analysis.ablation import analyse
from moejax.analysis.ablation_record import ABLATION, ANALYSIS, PLAN, RESULTS, read_record
from moejax.analysis.evaluate import RESULT as EVALUATION_RESULT
from moejax.analysis.inspect import FOLDER as INSPECT_FOLDER
from moejax.analysis.inspect import RESULT as INSPECT_RESULT
from moejax.analysis.report.curves import Curves, read_curves
from moejax.analysis.report.shapes import ANY, EVALUATION, misfit
from moejax.config import UserError
from moejax.cost import bill
from moejax.training import run_dir
from moejax.training.run_config import RunConfig

_ANALYSIS_NEEDS = dict.fromkeys((
    "name", "metric", "hold", "reference", "seeds", "budgets", "variants", "failed", "bill",
), ANY)  # fmt: skip
_INSPECTION_NEEDS = dict.fromkeys((
    "step", "tokens", "loss", "layers", "num_experts", "by_layer", "load", "gate_mass",
    "saturation", "flip_rate", "domains", "masked_best_experts", "left_out",
), ANY)  # fmt: skip
_NOT_RUNS = ("checkpoints", "tensorboard", "tokenizer", INSPECT_FOLDER)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run directory, read.

    Attributes:
      name: the folder's.
      path: the folder.
      record: ``config.json``.
      config: the config in it, checked.
      summary: ``summary.json``; None of a run that wrote none.
      curves: ``metrics.jsonl``.
      inspection: what ``moejax inspect`` found; None where it did not look.
      evaluation: what ``moejax evaluate`` found; None where it was not run.
      divergence: ``divergence.json``; None where the loss stayed finite.
    """

    name: str
    path: pathlib.Path
    record: dict[str, Any]
    config: RunConfig
    summary: dict[str, Any] | None
    curves: Curves
    inspection: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    divergence: dict[str, Any] | None

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint lies in the folder, be it whole or not."""
        folder = self.path / run_dir.CHECKPOINTS
        return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())

    @property
    def bits_per_nat(self) -> float | None:
        """Bits per byte of a loss of one nat per token on the held-out text; None if unknown."""
        for row in reversed(self.curves.validation):
            if row.get("val_loss") and row.get("val_bits_per_byte"):
                return row["val_bits_per_byte"] / row["val_loss"]
        return None


@dataclasses.dataclass(frozen=True)
class Ablation:
    """An ablation folder's files.

    Attributes:
      about: ``ablation.json``, with the resolved ``spec``.
      plan: ``plan.json``; empty where there is none.
      cells: the last line of each cell in ``results.jsonl``.
      analysis: ``moejax.analysis.ablation.analyse``'s result.
      missing: ids of completed cells whose run directories are not there.
    """

    about: dict[str, Any]
    plan: dict[str, Any]
    cells: list[dict[str, Any]]
    analysis: dict[str, Any]
    missing: list[str]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
      kind: which of the three.
      title: its heading.
      paths: the folders that were asked for.
      runs: every run in them.
      ablation: of kind ``ablation`` only.
      bill: ``moejax.cost.bill.summarize``'s result; None where no run has a ledger.
      notes: what the report has to do without, a line each.
    """

    kind: Literal["run", "set", "ablation"]
    title: str
    paths: list[pathlib.Path]
    runs: list[RunRecord]
    ablation: Ablation | None
    bill: dict[str, Any] | None
    notes: list[str] = dataclasses.field(default_factory=list)


def gather(directories: Sequence[str]) -> Subject:
    """Reads everything that a report shows.

    Args:
      directories: one run, one ablation folder, one folder of runs, or several runs or such.

    Raises:
      UserError: a folder that is missing or holds no run, a damaged file, a run of another config
        version, or ablations among several folders.
    """
    paths = []
    for directory in directories:
        path = pathlib.Path(directory)
        if not path.is_dir():
            raise UserError(f"{directory}: no such directory; give the folders of runs")
        if path.resolve() not in [other.resolve() for other in paths]:
            paths.append(path)
    ablations = [path for path in paths if (path / ABLATION).is_file()]
    if ablations and len(paths) > 1:
        raise UserError(f"{ablations[0]}: is an ablation's folder; give it alone")
    if ablations:
        return _gather_ablation(paths[0])
    notes: list[str] = []
    found = _with_models(_runs_under(paths), notes)
    names = _names(found)
    runs = [_read_run(path, name) for path, name in zip(found, names, strict=True)]
    if len(runs) == 1:
        title = runs[0].name
    else:
        title = paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"
    kind = "run" if len(runs) == 1 else "set"
    return Subject(kind, title, paths, runs, None, _bill(paths, notes), notes)


def _runs_under(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Every run in or under the folders, sorted within each, each once."""
    found: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        below = sorted(_with_config(path))
        if not below:
            raise UserError(
                f"{path}: holds no run (no {run_dir.CONFIG}); give the folder of a run, of several "
                "or of an ablation"
            )
        for run in below:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _with_models(found: list[pathlib.Path], notes: list[str]) -> list[pathlib.Path]:
    """The runs that trained a model; of the others there is a bill only, which a note says."""
    trained = [path for path in found if "model" in run_dir.read_record(path)["config"]]
    others = [path.name for path in found if path not in trained]
    if not trained:
        raise UserError(
            f"{found[0]}: trained no model, so there is a bill only; see moejax ledger, or give "
            "the folder of a run that did"
        )
    if others:
        notes.append(f"Of {', '.join(others)} there is a bill only: no model was trained.")
    return trained


def _with_config(path: pathlib.Path) -> list[pathlib.Path]:
    if (path / run_dir.CONFIG).is_file():
        return [path]
    below = [child for child in path.iterdir() if child.is_dir() and child.name not in _NOT_RUNS]
    return [run for child in below for run in _with_config(child)]


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The folders' names, with their parents' where two are the same."""
    names = [path.resolve().name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def _read_run(path: pathlib.Path, name: str) -> RunRecord:
    record = run_dir.read_record(path)
    try:
        config = run_dir.recorded(record)
    except UserError as error:
        code = record.get("code", {})
        version = f"moejax {code.get('moejax')}, revision {str(code.get('revision'))[:12]}"
        raise UserError(
            f"{path / run_dir.CONFIG}: a config of another version ({version}): {error}; make the "
            "report with that version"
        ) from None
    return RunRecord(
        name=name,
        path=path,
        record=record,
        config=config,
        summary=_json(path / run_dir.SUMMARY, {"status": ANY}),
        curves=read_curves(path),
        inspection=_json(path / INSPECT_FOLDER / INSPECT_RESULT, _INSPECTION_NEEDS),
        evaluation=_json(path / EVALUATION_RESULT, EVALUATION),
        divergence=_json(path / "divergence.json"),
    )


def _gather_ablation(path: pathlib.Path) -> Subject:
    """Without ``results.jsonl``, as where results are kept for good, ``analysis.json`` is read."""
    analysis = None if (path / RESULTS).is_file() else _json(path / ANALYSIS, _ANALYSIS_NEEDS)
    if analysis is None:
        record = read_record(path)
        about, plan, cells, analysis = record.about, record.plan, record.rows, analyse(path)
    else:
        about, plan, cells = _json(path / ABLATION) or {}, _json(path / PLAN) or {}, ()
    folder = path / "runs"
    found = sorted(_with_config(folder)) if folder.is_dir() else []
    runs = [_read_run(run, run.name) for run in found]
    names = {run.name for run in runs}
    missing = [
        row["id"] for row in cells if row["status"] == "completed" and row["id"] not in names
    ]
    ablation = Ablation(about, plan, list(cells), analysis, missing)
    notes: list[str] = []
    bill_ = _bill([path], notes)
    return Subject("ablation", str(analysis["name"]), [path], runs, ablation, bill_, notes)


def _bill(paths: Sequence[pathlib.Path], notes: list[str]) -> dict[str, Any] | None:
    try:
        return bill.summarize(paths)
    except UserError as error:
        notes.append(f"there is no bill: {error}")
        return None


def _json(path: pathlib.Path, needed: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The object in a file; None where there is no file.

    Args:
      path: the file.
      needed: fields that it has to hold, with their shapes; see ``shapes.misfit``.

    Raises:
      UserError: the file is damaged, or a field that is needed is missing or of another shape.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; restore the file")
    wrong = misfit(found, needed or {})
    if wrong:
        raise UserError(f"{path}: {wrong}; restore the file")
    return found
