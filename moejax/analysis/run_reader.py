"""A run and its checkpoints, as the commands that look into a trained model read them."""

import pathlib
from collections.abc import Callable
from typing import Any

from moejax.config import UserError
from moejax.parallel import MeshConfig, make_mesh
from moejax.training import run_dir
from moejax.training.checkpoints import Checkpointer, CheckpointError
from moejax.training.optimizers import make_optimizer
from moejax.training.run_config import RunConfig
from moejax.training.state import make_init

Say = Callable[[str], None]
Restore = Callable[[int], dict[str, Any]]


def read_run(path: pathlib.Path, shown: str) -> dict[str, Any]:
    """What a run's ``config.json`` holds.

    Args:
      path: the run's folder.
      shown: the flag and its value, for messages.

    Raises:
      UserError: no such folder, no run in it, or a damaged record.
    """
    if not path.is_dir():
        raise UserError(f"{shown}: no such folder; give a run's folder")
    if not (path / run_dir.CONFIG).is_file():
        raise UserError(f"{shown}: no run is there (no {run_dir.CONFIG}); give a run's folder")
    return run_dir.read_record(path)


def check_steps(checkpoints: Checkpointer, step: int | None, shown: str) -> list[int]:
    """The steps that a run has checkpoints of.

    Args:
      checkpoints: the run's.
      step: the one that is asked for, which is verified; None for any.
      shown: the run's flag and its value, for messages.

    Raises:
      UserError: no checkpoint, or not of that step, or a damaged one.
    """
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{shown}: the run has no checkpoint yet; train on")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"--step = {step}: the run has no such checkpoint; choose from {there}")
    if step is not None:
        try:
            checkpoints.verify(step)
        except CheckpointError as error:
            raise UserError(f"--step = {step}: {error}; choose another") from None
    return steps


def restorer(config: RunConfig, checkpoints: Checkpointer) -> Restore:
    """From a step to the model's variables on one device; raises CheckpointError."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    _, abstract = make_init(config.model, optimizer, make_mesh(MeshConfig()))

    def restore(step: int) -> dict[str, Any]:
        state = checkpoints.restore(abstract, step).state
        return {"params": state.params, "router_state": state.router_state}

    return restore


def newest_good(steps: list[int], restore: Restore, say: Say) -> tuple[int, dict[str, Any]]:
    """The newest checkpoint that is whole, and its variables; damaged ones are passed over aloud.

    Raises:
      CheckpointError: none is whole.
    """
    for step in reversed(steps):
        try:
            say(f"checkpoint  {step}")
            return step, restore(step)
        except CheckpointError as error:
            if step == steps[0]:
                raise
            say(f"left out: {error}")
    raise AssertionError("there is a step at least")
