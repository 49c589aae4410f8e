"""Which checkpoints of ended cells stay; see ``AblationSpec.keep_checkpoints``."""

import pathlib
import shutil
from collections.abc import Sequence

from moejax.ablation.grid import Cell
from moejax.ablation.record import RUNS, Folder
from moejax.ablation.spec import AblationSpec
from moejax.training import manifest, run_dir
from moejax.training.checkpoints import Checkpointer

SAMPLE_BYTES = 256 << 20


def clean(folder: Folder, spec: AblationSpec, cells: Sequence[Cell], ended: set[str]) -> None:
    """Deletes what is not to be kept of cells that ended, once nothing branches off them any more.

    It may be called at any time, and again: what a kill left undone is done then.
    """
    waiting = {cell.trunk for cell in cells if cell.trunk and cell.id not in ended}
    for cell in cells:
        if cell.id in ended - waiting:
            _keep(folder.run(cell.id) / run_dir.CHECKPOINTS, _wanted(spec, cell))


def remove_torn(folder: Folder) -> None:
    """Deletes what a kill left of a branch that was not yet whole."""
    for path in (folder.path / RUNS).glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def _wanted(spec: AblationSpec, cell: Cell) -> str:
    """``all``, ``last``, ``small`` (the last, if small) or ``none``."""
    kept = spec.keep_checkpoints
    if kept == "sample":
        first = cell.kind in ("final", "trunk") and cell.seed == spec.seeds[0]
        return "small" if first else "none"
    return {True: "all", False: "none", "last": "last"}[kept]


def _keep(path: pathlib.Path, wanted: str) -> None:
    if wanted == "all" or not path.is_dir():
        return
    with Checkpointer(path) as checkpoints:
        steps = checkpoints.steps()
    last = steps[-1] if steps and wanted != "none" else None
    if last is not None and wanted == "small":
        size = sum(file.stat().st_size for file in (path / str(last)).rglob("*") if file.is_file())
        last = last if size <= SAMPLE_BYTES else None
    if last is None:
        for entry in path.iterdir():
            manifest.delete(entry)
        path.rmdir()
        return
    for entry in path.iterdir():
        if entry.name != str(last):
            manifest.delete(entry)
