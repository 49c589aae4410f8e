"""Copies of the state on a local disk or in memory, for a restart on the same machine.

They are checkpoints like those of the run directory, sealed by the same manifest, but saved more
often and of the newest two steps only. A restart takes the newest good one of both places. A run
that completes deletes them, and so does one that goes back: what is newer there is of a future that
is given up.
"""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from moejax.config import ConfigError, check
from moejax.output_folder import why_not_writable
from moejax.parallel import together
from moejax.training.checkpoints import CheckpointConfig, Checkpointer, CheckpointError, Restored
from moejax.training.run_dir import RunDirectory

KEPT = 2


class LocalCopies(Checkpointer):
    """The local copies of one run.

    Args:
      config: the run's block ``checkpoint``; one with a ``local_dir``.
      name: what tells this run from every other one that shares the folder.
      on_error: takes the CheckpointError of a copy that could not be written.
    """

    def __init__(
        self, config: CheckpointConfig, name: str, on_error: Callable[[CheckpointError], None]
    ):
        folder = pathlib.Path(config.local_dir).absolute() / _folder_name(name)
        super().__init__(folder, CheckpointConfig(keep_newest=KEPT, keep_best=0), on_error)
        self._every = config.local_every

    def rename(self, name: str) -> None:
        """Gives the copies another name; copies that still lie elsewhere keep the old one."""
        target = self.directory.with_name(_folder_name(name))
        if self.directory.exists():
            os.replace(self.directory, target)
        self.directory = target

    def due(self, step: int) -> bool:
        """Whether a step is copied."""
        return step % self._every == 0

    def copy(self, step: int, state: PyTree[jax.Array], extra: dict[str, Any]) -> None:
        """Begins to copy a step, unless the copy before it is still being written."""
        if not self.busy:
            self.save(step, state, extra)

    def delete(self) -> None:
        """Deletes the copies of a run that needs them no more."""
        shutil.rmtree(self.directory, ignore_errors=True)


def open_local(
    config: CheckpointConfig, directory: RunDirectory, on_error: Callable[[CheckpointError], None]
) -> LocalCopies | None:
    """The local copies of the run in a directory; None where the config wants none."""
    if not config.local_dir:
        return None
    return LocalCopies(config, run_name(directory), on_error)


def run_name(directory: RunDirectory) -> str:
    """What tells a run from others, and from its own futures that were given up."""
    record = directory.record
    return f"{record['fingerprint']} {directory.path} {len(record.get('given_up', []))}"


def _folder_name(name: str) -> str:
    return f"moejax-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def check_folder(config: CheckpointConfig) -> None:
    """Checks ``checkpoint.local_dir``, without writing there.

    Raises:
      ConfigError: it cannot be written, or several processes train.
    """
    if not config.local_dir:
        return
    where = "checkpoint.local_dir"
    why = why_not_writable(pathlib.Path(config.local_dir).absolute())
    check(why is None, where, config.local_dir, why or "")
    if together.count() > 1:
        raise ConfigError(
            where, config.local_dir,
            f"copies are of the whole state, and each of {together.count()} processes has a "
            "part of it; leave local_dir out",
        )  # fmt: skip


def restore_newest(
    places: list[Checkpointer],
    abstract: PyTree,
    say: Callable[[str], None],
    allowed: Callable[[int], bool] = lambda step: True,
) -> Restored | None:
    """Restores the newest good checkpoint of several places; saves go on from there in all.

    Args:
      places: the run directory's checkpoints first; of two of a step, a later place's is taken.
      abstract: the state's shapes, with shardings.
      say: takes lines for the user: why newer ones were refused, and which place it is from.
      allowed: which steps may be restored.

    Returns:
      None where no place has a sealed checkpoint of such a step, or only other places than the
      first have one, and it is damaged.

    Raises:
      CheckpointError: the first place has some, and no place has a good one; or the newest good
        one is of another model.
    """
    steps = together.decide(lambda: [place.folders() for place in places])
    found = [(s, i) for i, own in enumerate(steps) for s in own if allowed(s)]
    refused: list[str] = []
    for step, i in sorted(found, reverse=True):
        try:
            together.decide(lambda step=step, i=i: places[i].verify(step), CheckpointError)
        except CheckpointError as error:
            refused.append(f"{error} (in {places[i].directory})" if i else str(error))
            continue
        if refused:
            refused.append(f"going back to the checkpoint of step {step}")
        if i:
            own = max((s for s in places[0].steps() if allowed(s)), default=None)  # one process
            than = "none" if own is None else f"of step {own}"
            refused.append(
                f"the checkpoint of step {step} is a local copy in {places[i].directory}; the run "
                f"directory's newest is {than}"
            )
        for text in refused:
            say(text)
        restored = places[i].load(step, abstract)
        for other in places[:i] + places[i + 1 :]:
            other.came_through(step)
        return restored
    if any(allowed(s) for s in together.decide(places[0].steps)):
        raise CheckpointError(f"no good checkpoint in {places[0].directory}: {'; '.join(refused)}")
    for text in refused:
        say(text)
    return None
