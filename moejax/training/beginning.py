"""What a process of a run says first, and the state that it goes on from."""

import math
from typing import Any, NamedTuple

import jax

from moejax.cost.plan_text import format_plan
from moejax.training import prepare
from moejax.training.checkpoints import Restored
from moejax.training.programs import Programs
from moejax.training.run_dir import RunDirectory
from moejax.training.state import TrainState


class Beginning(NamedTuple):
    """A state to train on from, and what belongs to it.

    Attributes:
      state: the training state.
      step: optimizer steps that it has behind it.
      tokens: tokens that it has seen.
      position: of the input pipeline, in global batches.
      loss: of its last step; NaN for none.
      val_loss, val_step: the last validation before it, and after which step that was.
      guard: what the divergence guard knew; see ``Guard.state``.
    """

    state: TrainState
    step: int = 0
    tokens: int = 0
    position: int = 0
    loss: float = math.nan
    val_loss: float = math.nan
    val_step: int | None = None
    guard: dict[str, Any] | None = None

    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the state."""
        return {
            "data_position": self.position,
            "loss": self.loss,
            "val_loss": self.val_loss if math.isfinite(self.val_loss) else None,
            "val_step": self.val_step,
            "tokens": self.tokens,
            "guard": self.guard,
        }


def from_checkpoint(restored: Restored) -> Beginning:
    """The state of a checkpoint."""
    extra = restored.extra
    return Beginning(
        restored.state, restored.step, extra["tokens"], extra["data_position"], extra["loss"],
        extra["val_loss"] or math.nan, extra["val_step"], extra.get("guard"),
    )  # fmt: skip


def from_seed(programs: Programs, seed: int) -> Beginning:
    """The state of step 0."""
    return Beginning(programs.init(jax.random.key(seed)))


def announcement(setup: prepare.Setup, directory: RunDirectory) -> list[str]:
    """Lines for the user before anything is compiled: the bill, the text, what computes it."""
    lines = [format_plan(prepare.plan_run(setup)), prepare.epochs_line(setup)]
    lines += prepare.precision_lines(setup.config.model)
    lines += prepare.back_end_lines(setup.config.model.moe, setup.choice, setup.products)
    provenance = setup.dataset.provenance
    if "warning" in provenance:
        lines.append(f"warning: {provenance['warning']}")
    return [*lines, *directory.changes]
