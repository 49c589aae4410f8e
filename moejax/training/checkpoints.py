"""Checkpoints: saved by Orbax in the background, sealed by a SHA-256 manifest of our own.

A step's folder holds ``state/`` (Orbax), ``extra.json`` (the input pipeline's position and the
like) and ``manifest.json``, which lists every other file with its size and digest. The manifest is
written last and read first: **no manifest, no checkpoint**. A save that was killed leaves none, and
a folder that is being deleted loses it first. Orbax alone would restore flipped bits silently.
"""

import contextlib
import json
import math
import os
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from moejax.parallel import together
from moejax.training import manifest
from moejax.training.checkpoint_config import CheckpointConfig
from moejax.training.checkpoint_leaves import check_same_leaves, describe
from moejax.training.manifest import CheckpointError
from moejax.training.quiet_orbax import quieten

EXTRA, STATE = "extra.json", "state"
# With several processes: how long those that have written wait for one that has not, and how long
# a run that ends on an error waits for its last save.
PEERS_SECONDS, CLOSE_SECONDS = 300, 20.0


class Restored(NamedTuple):
    """What ``Checkpointer.restore`` found; ``messages`` are to be shown to the user."""

    state: PyTree[jax.Array]
    extra: dict[str, Any]
    step: int
    messages: list[str]


class Checkpointer:
    """The checkpoints of one run directory. Reading never changes the directory.

    Saves go on in the background, one at a time. A save that fails (a full disk) leaves the
    checkpoints before it as they were; its CheckpointError is passed to ``on_error`` at the next
    ``save``, ``poll``, ``finalize`` or ``close``, in the caller's thread, or raised there without
    an ``on_error``. With several processes all call the same methods in the same order, on a file
    system that they share; process 0 writes the manifest, and what went wrong on one of them went
    wrong on all.

    Args:
      directory: where the steps' folders are; made at the first save.
      config: how many to keep.
      on_error: takes the CheckpointError of a failed save, so that training goes on.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        on_error: Callable[[CheckpointError], None] | None = None,
    ):
        self.directory = pathlib.Path(directory).absolute()
        self.config = config or CheckpointConfig()
        self._on_error = on_error
        self._damaged: set[int] = set()  # found by a restore; they do not count as kept
        several = {"timeout_secs": PEERS_SECONDS} if together.count() > 1 else {}
        self._orbax = ocp.StandardCheckpointer(async_options=ocp.AsyncOptions(**several))
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._committed: list[int] = []
        self._at: int | None = None  # the step last saved or restored here
        self._begun: int | None = None  # the step that the run is known to have come through
        self._before: int | None = None  # the one before it
        quieten()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # Saving

    def save(
        self,
        step: int,
        state: PyTree[jax.Array],
        extra: Mapping[str, Any],
        *,
        val_loss: float | None = None,
        wait: bool = False,
    ) -> bool:
        """Starts to save a step; returns once the state may be donated.

        First waits for the save before it. Once the new step has its manifest, folders that are
        neither among the newest nor the best nor of ``at_steps`` are deleted, and so are later
        steps: they belong to a future that a restore went back from.

        Args:
          step: optimizer steps done.
          state: jax arrays of any dtype, typed PRNG keys included; no empty arrays.
          extra: JSON-ready values, restored beside the state.
          val_loss: validation loss, lower is better; None or non-finite is never the best.
          wait: return only once the checkpoint is sealed.

        Returns:
          Whether a save was begun: False for the step that was saved or restored last, and where
          ``on_error`` took the reason.

        Raises:
          CheckpointError: the save before this one failed, this one failed at once, or the
            directory has a later checkpoint that this run did not begin from.
          TypeError: a leaf of the state is not a jax array, or ``extra`` is not JSON-ready.
        """
        self.finalize()
        if step == self._at:
            return False
        later = [s for s in together.decide(self.steps) if s >= step]
        if later and (self._begun is None or self._begun > step):
            raise CheckpointError(
                f"{self.directory} already has a checkpoint of step {later[-1]}, and this run did "
                f"not begin from it; resume it, or use another work directory for step {step}"
            )
        leaves, text = describe(state), json.dumps(dict(extra), indent=1)
        try:
            together.decide(lambda: self._clear(step), OSError)
            self._orbax.save(self._folder(step) / STATE, state)
        except OSError as error:
            self._fail(step, error)
            self._report()
            return False
        loss = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        content = {"step": step, "val_loss": loss, "leaves": leaves}
        self._thread = threading.Thread(
            target=self._seal, args=(step, text, content), name="seal checkpoint",
            daemon=together.count() > 1,
        )  # fmt: skip
        self._thread.start()
        if wait:
            self.finalize()
        return True

    def poll(self) -> list[int]:
        """Steps sealed since the last call, without waiting; reports a failed save."""
        self._report()
        committed, self._committed = self._committed, []
        return committed

    def finalize(self) -> None:
        """Waits for the pending save and its manifest; reports a failed save."""
        if self._thread is not None:
            self._join()
        self._report()

    def _join(self) -> None:
        """Waits for the pending save; if it failed on one process, it did on all."""
        self._thread.join()
        self._thread = None
        told = together.exchange(None if self._failure is None else str(self._failure))
        failed = next((text for text in told if text is not None), None)
        if failed is not None and self._failure is None:
            self._failure = CheckpointError(failed)
            self._at = self._begun = self._before

    def close(self) -> None:
        """Waits for what is pending, reports a failed save, and ends Orbax's threads.

        One of several processes that has a save pending here ends on an error: its peers may be
        gone, and it does not wait for them for long.
        """
        if self._thread is not None and together.count() > 1:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                return
            self._thread = None
        try:
            self.finalize()
        finally:
            self._orbax.close()

    def _report(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None and self._on_error is None:
            raise failure
        if failure is not None:
            self._on_error(failure)

    def _fail(self, step: int, error: Exception) -> None:
        # Orbax queues an error for every file; left there, they would fail the next save.
        for _ in range(100):
            with contextlib.suppress(Exception):
                self._orbax.wait_until_finished()
                break
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                manifest.delete(self._folder(step))  # a full disk needs the space
        last = self.latest_step()
        good = "there is none before it" if last is None else f"the last good one is of step {last}"
        self._failure = CheckpointError(
            f"checkpoint of step {step} was not saved: {_reason(error)}; {good}"
        )

    def _clear(self, step: int) -> None:
        """Makes an empty folder for a step, and room: what a killed save left behind goes."""
        for other in self.folders():
            if other == step or not (self._folder(other) / STATE).exists():
                manifest.delete(self._folder(other))
        self._folder(step).mkdir(parents=True)

    def _seal(self, step: int, extra: str, content: dict[str, Any]) -> None:
        """In a thread: waits for Orbax's commit, then writes the manifest and makes room."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write_whole(self._folder(step) / EXTRA, extra)
                manifest.seal(self._folder(step), content)
        except Exception as error:  # whatever it was, it is told to the caller's thread
            self._fail(step, error)
            return
        self._before, self._at, self._begun = self._at, step, step
        self._committed.append(step)
        try:
            if jax.process_index() == 0:
                self._delete_old(step)
        except OSError as error:
            self._failure = CheckpointError(
                f"checkpoint of step {step} is safe, but older ones cannot be deleted: "
                f"{_reason(error)}"
            )

    def _delete_old(self, step: int) -> None:
        sound = lambda s: s <= step and (s == step or s not in self._damaged)
        losses = {s: loss for s, loss in self._losses().items() if sound(s)}
        best = sorted((s for s in losses if losses[s] is not None), key=lambda s: (losses[s], -s))
        keep = {step, *sorted(losses)[-self.config.keep_newest :], *best[: self.config.keep_best]}
        keep |= losses.keys() & set(self.config.at_steps)
        for other in self.folders():
            if other not in keep:
                manifest.delete(self._folder(other))

    def came_through(self, step: int) -> None:
        """Says that the run goes on from a step whose state is not from here."""
        self._at, self._begun = None, step

    def give_up_after(self, step: int) -> list[int]:
        """Deletes what is here of later steps: the run has gone back, and they are of a future that
        is given up; -1 deletes all.

        Returns:
          Steps of the checkpoints that were deleted.

        Raises:
          CheckpointError: they cannot be deleted.
        """
        self._at, self._begun = (step if self._at == step else None), step
        return together.decide(lambda: self._delete_after(step), CheckpointError)

    def _delete_after(self, step: int) -> list[int]:
        given_up = [s for s in self.steps() if s > step]
        try:
            for other in (s for s in self.folders() if s > step):
                manifest.delete(self._folder(other))
        except OSError as error:
            raise CheckpointError(
                f"checkpoints of steps {given_up} are given up and cannot be deleted: "
                f"{_reason(error)}"
            ) from error
        return given_up

    # Finding

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def folders(self) -> list[int]:
        """Steps that have a folder, sealed or not, oldest first."""
        return manifest.folders(self.directory)

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def steps(self) -> list[int]:
        """Steps that have a manifest, oldest first; their files are not verified here."""
        return manifest.sealed(self.directory)

    def latest_step(self) -> int | None:
        """The newest step that has a manifest."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the lowest validation loss, the later one where two are equal."""
        losses = {s: loss for s, loss in self._losses().items() if loss is not None}
        return min(losses, key=lambda s: (losses[s], -s), default=None)

    def _losses(self) -> dict[int, float | None]:
        losses = {}
        for step in self.steps():
            with contextlib.suppress(CheckpointError):
                losses[step] = manifest.read(self._folder(step), step)["val_loss"]
        return losses

    # Restoring

    def verify(self, step: int) -> None:
        """Hashes every file of a step and compares it with the manifest.

        Raises:
          CheckpointError: there is no such step, it has no manifest or a damaged one, or a file
            (which is named) is missing, of another size, changed, or outside the folder.
        """
        try:
            manifest.verify(self._folder(step), step)
        except CheckpointError:
            self._damaged.add(step)
            raise

    def restore(self, abstract_state: PyTree, step: int | None = None) -> Restored:
        """Restores the newest checkpoint that passes ``verify``, or exactly the step asked for.

        Args:
          abstract_state: ShapeDtypeStructs; their shardings decide where the arrays go, whatever
            mesh they were saved on. Without one, an array goes to the first local device.
          step: only this one will do, and there is no going back to an earlier one.

        Returns:
          state, extra, step and messages: why newer checkpoints were refused, if any were.

        Raises:
          CheckpointError: no good checkpoint, or one of another model (the first leaf that
            differs is named).
        """
        if self._thread is not None:
            self._join()
        failure, self._failure = self._failure, None
        messages = [] if failure is None else [str(failure)]
        refused = []
        for candidate in together.decide(self.folders)[::-1] if step is None else [step]:
            try:
                together.decide(lambda step=candidate: self.verify(step), CheckpointError)
            except CheckpointError as error:
                refused.append(str(error))
                continue
            if refused:
                refused.append(f"going back to the checkpoint of step {candidate}")
            found = self.load(candidate, abstract_state)
            return found._replace(messages=messages + refused)
        if step is not None:
            raise CheckpointError(refused[0])
        reasons = f": {'; '.join(refused)}" if refused else ""
        raise CheckpointError(f"no good checkpoint in {self.directory}{reasons}")

    def load(self, step: int, abstract_state: PyTree) -> Restored:
        """Restores a step that ``verify`` passed; saves go on from there.

        Raises:
          CheckpointError: it is of another model, or cannot be restored here.
        """
        folder = self._folder(step)
        check_same_leaves(manifest.read(folder, step)["leaves"], abstract_state, step)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here
            ),
            abstract_state,
        )
        try:
            extra = json.loads((folder / EXTRA).read_text())
            state = self._orbax.restore(folder / STATE, target)
        except Exception as error:  # Orbax raises many kinds
            raise CheckpointError(
                f"checkpoint of step {step} cannot be restored here: {_reason(error)}"
            ) from error
        self._at = self._begun = step
        return Restored(state, extra, step, [])


def _reason(error: Exception) -> str:
    """An exception as part of one line."""
    if "No space left on device" in str(error):
        return "no space left on the device; free some"
    if "Read-only file system" in str(error):
        return "its file system is read-only; mount it for writing"
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}"


__all__ = ["CheckpointConfig", "CheckpointError", "Checkpointer", "Restored"]
