"""What a bad step leaves behind, and what is said of it."""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moejax.data import batch_fingerprint
from moejax.training.failures import Diverged, NonFiniteLoss
from moejax.training.guard import BadStep, Guard

RECORD, BATCH = "divergence.json", "divergence_batch.npz"


def leave_inspection(
    folder: pathlib.Path, bad: BadStep, last_good: int | None, say: Callable[[str], None]
) -> None:
    """Writes the newest bad step and its batch into the run directory, to look into.

    A disk that has no room for them is said, and stops nothing.
    """
    record = {
        "step": bad.step,
        "why": bad.why,
        "loss": repr(bad.loss),
        "gradient_norm": repr(bad.gradient_norm),
        "batch_fingerprint": batch_fingerprint(bad.batch),
        "batch_position": bad.position,
        "last_good_checkpoint": last_good,
    }
    try:
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        np.savez_compressed(folder / BATCH, **bad.batch)
    except OSError as error:
        say(f"warning: {RECORD} and {BATCH} cannot be written: {error.strerror or error}")
        with contextlib.suppress(OSError):
            (folder / BATCH).unlink(missing_ok=True)


def newest_good(steps: Sequence[int], guard: Guard, bad: BadStep) -> int | None:
    """The newest of these checkpoints that a run can go back to; None for none."""
    return max((step for step in steps if guard.is_good(step, bad.step)), default=None)


def stopped_by(bad: BadStep, guard: Guard, last_good: int | None) -> Diverged:
    """The error that ends a run at a bad step, in one line."""
    good = f"checkpoint {last_good} is good"
    if last_good is None:
        good = "there is no good checkpoint"
    parts = [f"step {bad.step}: {bad.why}", good, f"{RECORD} and {BATCH} hold the batch"]
    if guard.config.action == "rewind":
        most = guard.config.most_rewinds
        spent = f"the run went back {most} times, the most that guard.most_rewinds allows"
        none = "none that is kept was saved early enough; a larger checkpoint.keep_newest helps"
        parts.insert(1, none if guard.may_rewind else spent)
    finite = math.isfinite(bad.loss) and math.isfinite(bad.gradient_norm)
    return (Diverged if finite else NonFiniteLoss)("; ".join(parts))


def rewind_line(entry: dict[str, Any], times: int, most: int) -> str:
    """What is said of a rewind."""
    first, last = entry["skipped"][0], entry["skipped"][-1]
    batches = f"batch {first} is" if first == last else f"batches {first} to {last} are"
    return (
        f"guard: step {entry['step']}: {entry['why']}; going back to step {entry['to']}, and "
        f"{batches} left out (rewind {times} of at most {most})"
    )
