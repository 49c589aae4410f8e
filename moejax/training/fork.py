"""A run that branches off from another one: its checkpoint in a folder of its own, to go on from.

Runs under the schedule ``wsd`` are the same up to where the first of them begins its decay. One
trunk then serves runs of several lengths, and the part that they share is trained, and charged,
once.
"""

import dataclasses
import json
import pathlib
import shutil

from moejax.config import ConfigError
from moejax.output_folder import check_new_folder, whole_folder
from moejax.training import manifest, run_config, run_dir
from moejax.training.optimizers import decay_start
from moejax.training.run_config import RunConfig


def fork_step(config: RunConfig) -> int:
    """The step at which a run can branch off from a longer one: the first of its decay.

    Returns:
      Steps that both have behind them; 0 where they share none.

    Raises:
      ConfigError: the run's length matters before that: a schedule without a stable part, a run
        that ends in its warm-up, or MTP modules whose weight changes earlier.
    """
    optim, train = config.optim, config.train
    if optim.schedule != "wsd":
        raise ConfigError(
            "optim.schedule", optim.schedule,
            "has no stable part that runs of several lengths could share; use 'wsd'",
        )  # fmt: skip
    start = decay_start(optim, train.steps)
    if optim.warmup_steps > start:
        raise ConfigError(
            "optim.warmup_steps", optim.warmup_steps,
            f"a run of {train.steps} steps ends or decays before its warm-up is over; use fewer, "
            "or a larger budget",
        )  # fmt: skip
    changes = train.mtp_weight != train.mtp_weight_final
    if config.model.mtp_depth and changes and round(train.mtp_switch * train.steps) < start:
        raise ConfigError(
            "train.mtp_switch", train.mtp_switch,
            f"changes the MTP modules' weight before the decay of a run of {train.steps} steps "
            "begins, which runs of several lengths cannot share; use a larger share, or "
            "mtp_weight_final = mtp_weight",
        )  # fmt: skip
    return start


def fork_run(source: pathlib.Path, target: pathlib.Path, steps: int, step: int) -> None:
    """Writes a run that goes on from another run's checkpoint, as a whole or not at all.

    ``moejax.training.train.train`` resumes it at ``step``, and its ledger begins there. What it
    comes to is what the same run comes to that does all of its steps itself.

    Args:
      source: the other run's folder.
      target: folder for the run, new or empty.
      steps: ``train.steps`` of the run; all else is as in the other one.
      step: of the checkpoint, at most the run's ``fork_step``.

    Raises:
      UserError: no run in ``source``, or the checkpoint is missing or damaged.
      ValueError: the runs are no longer the same at that step.
    """
    before = run_dir.read_record(source)
    config = run_config.from_dict(before["config"])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    if step > fork_step(config):
        raise ValueError(f"step {step} is beyond {fork_step(config)}, where the decay begins")
    target = check_new_folder(target, str(target))
    manifest.verify(source / run_dir.CHECKPOINTS / str(step), step)
    record = {**before, "config": config.to_dict()}
    record["fingerprint"] = run_dir.fingerprint(record)
    record["from"] = {"run": source.name, "step": step}
    with whole_folder(target, str(target)) as folder:
        copy = folder / run_dir.CHECKPOINTS / str(step)
        shutil.copytree(source / run_dir.CHECKPOINTS / str(step), copy)
        manifest.verify(copy, step)
        shutil.copytree(source / run_dir.TOKENIZER, folder / run_dir.TOKENIZER)
        manifest.write_whole(folder / run_dir.CONFIG, json.dumps(record, indent=1) + "\n")
