"""Which checkpoints of ended cells stay; see ``AblationSpec.keep_checkpoints``."""

import pathlib
import shutil
from collections.abc import Mapping, Sequence

from moejax.ablation.grid import Cell
from moejax.ablation.record import RUNS, Folder
from moejax.ablation.spec import AblationSpec
from moejax.training import manifest, run_dir

SAMPLE_BYTES = 256 << 20


def clean(
    folder: Folder, spec: AblationSpec, cells: Sequence[Cell], status: Mapping[str, str]
) -> None:
    """Deletes what is not to be kept of cells that ended, once nothing branches off them any more.

    It may be called at any time, and again: what a kill left undone is done then.

    Args:
      folder, spec, cells: the ablation's.
      status: how each cell ended, of those that did.
    """
    waiting = {cell.trunk for cell in cells if cell.trunk and cell.id not in status}
    for cell in cells:
        if cell.id in status and cell.id not in waiting:
            wanted = _wanted(spec, cell, status[cell.id] == "failed")
            _keep(folder.run(cell.id) / run_dir.CHECKPOINTS, wanted)


def remove_torn(folder: Folder) -> None:
    """Deletes what a kill left of a branch that was not yet whole."""
    for path in (folder.path / RUNS).glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def _wanted(spec: AblationSpec, cell: Cell, failed: bool) -> str:
    """``all``, ``last``, ``small`` (the last, if small) or ``none``."""
    kept = spec.keep_checkpoints
    if kept == "sample":
        first = cell.kind in ("final", "trunk") and cell.seed == spec.seeds[0]
        return "small" if first or failed else "none"
    return {True: "all", False: "none", "last": "last"}[kept]


def _keep(path: pathlib.Path, wanted: str) -> None:
    if wanted == "all" or not path.is_dir():
        return
    sealed = [entry for entry in path.iterdir() if (entry / manifest.NAME).is_file()]
    steps = sorted(int(entry.name) for entry in sealed if entry.name.isdigit())
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
