"""Runs of upcycled variants: each goes on from a dense run, which its budget has paid for."""

from moejax.ablation import grid
from moejax.ablation.grid import Cell
from moejax.ablation.record import Folder
from moejax.ablation.spec import AblationSpec
from moejax.training import run_config, run_dir
from moejax.training.run_config import RunConfig
from moejax.training.upcycle_command import upcycle_run


def begin(folder: Folder, spec: AblationSpec, cell: Cell) -> RunConfig:
    """The run of an upcycled cell, made from its dense run where it is not there yet.

    Its schedule and its optimizer begin anew, its data at the first row.

    Raises:
      UserError: the dense run has no checkpoint, or cannot become this model.
    """
    path, how = folder.run(cell.id), spec.upcycled(cell.variant)
    if not path.exists():
        wanted = grid.cell_config(spec, cell)
        blocks = wanted.to_dict()
        first = blocks.pop("model")["first_k_dense"]
        settings = [f"{name}={value!r}" for name, value in blocks.items()]
        upcycle_run(
            str(folder.run(cell.trunk)), str(path),
            overrides=[*settings, f"model.first_k_dense={first}"],
            router_std=how.router_std, noise=how.noise,
        )  # fmt: skip
    return run_config.from_dict(run_dir.read_record(path)["config"])
