"""Seconds of a training step, measured once: what turns a budget of time or dollars into steps."""

import dataclasses
import itertools
import statistics
from typing import Any

from moejax.ablation.record import Folder
from moejax.ablation.spec import AblationSpec
from moejax.cost import bill
from moejax.training.loop import Interrupted
from moejax.training.metrics import read_metrics
from moejax.training.run_config import RunConfig
from moejax.training.train import train

STEPS, LOG_EVERY = 30, 5


def calibration_config(config: RunConfig) -> RunConfig:
    """A variant's run, cut to a few steps, with all else as it will be."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train, steps=STEPS, log_every=LOG_EVERY, eval_every=0, sample_tokens=0
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=0, at_steps=()),
        cost=dataclasses.replace(config.cost, final=False),
        stage="ablation",
    )


def run_name(variant: str) -> str:
    """Name of the run that measures a variant."""
    return f"{variant}-calibration"


def calibrate(
    folder: Folder, spec: AblationSpec, variant: str, *, bill_process: bool = False
) -> dict[str, Any]:
    """Trains a variant for a few steps, in a run directory of its own, which is billed.

    Compilation and the first steps are left out; the median over what follows is little moved by
    what else the machine does. A second call measures nothing again.

    Args:
      folder, spec: the ablation's.
      variant: whose step is measured.
      bill_process: charge the time since this process began to it.

    Returns:
      ``seconds_per_step``, ``low`` and ``high`` over the intervals measured, ``steps``, ``device``,
      ``devices``, and the ``device_hours`` and ``dollars`` that it took.

    Raises:
      Interrupted: it was asked to stop; nothing is measured then.
      RunFailed, UserError: see ``moejax.training.train.train``.
    """
    name = run_name(variant)
    path = folder.run(name)
    with folder.logged(name):
        config = calibration_config(spec.run_config(variant))
        summary = train(config, str(path), bill_process=bill_process)
    if summary["status"] == "interrupted":
        raise Interrupted("asked to stop")
    rows = [row for row in read_metrics(path) if "tokens_per_second" in row]
    seconds = []
    for before, row in itertools.pairwise(rows):
        if before["step"] >= LOG_EVERY:
            tokens = row["tokens"] - before["tokens"]
            seconds.append(tokens / row["tokens_per_second"] / (row["step"] - before["step"]))
    charged = bill.read(path)
    return {
        "seconds_per_step": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "steps": STEPS,
        "device": charged["device"],
        "devices": charged["devices"],
        "device_hours": charged["device_hours"],
        "dollars": charged["dollars"],
    }
