"""Going back: to the last good state from a bad step, and what is given up on the way."""

from typing import TYPE_CHECKING

from moejax.parallel import together
from moejax.training.beginning import from_checkpoint
from moejax.training.divergence import leave_inspection, newest_good, rewind_line, stopped_by
from moejax.training.guard import BadStep
from moejax.training.local_copies import restore_newest, run_name

if TYPE_CHECKING:
    from moejax.training.loop import Run


def give_up_after(run: "Run", step: int) -> None:
    """Deletes what later steps left behind (-1: all that there is), and says so.

    Raises:
      CheckpointError: their checkpoints cannot be deleted.
    """
    given_up = sorted({s for place in run.places for s in place.give_up_after(step)})
    try:
        run.directory.give_up(max(step, 0), given_up)
    except OSError as error:
        run.say(f"warning: config.json does not say what was given up: {error.strerror or error}")
    if run.local is not None:
        run.local.rename(run_name(run.directory))
    if given_up:
        steps = ", ".join(map(str, given_up))
        run.say(f"going back to step {max(step, 0)}: given up: checkpoints of steps {steps}")


def rewind(run: "Run", bad: BadStep) -> None:
    """Goes back to the last good state and leaves out the batches around the bad one.

    Nothing is compiled: the run's programs make the first state as they did at its beginning.

    Raises:
      Diverged: the run is to stop, or there is nothing good to go back to.
    """
    guard, ledger = run.guard, run.ledger
    pending, run.pending = run.pending, None
    if pending is not None:  # computed on what the bad step made
        with ledger.phase("train"):
            run.charge(pending)
    for place in run.places:
        place.finalize()
    last_good = newest_good(together.decide(run.checkpoints.steps), guard, bad)
    if run.first:
        leave_inspection(run.directory.path, bad, last_good, run.say)
    if not guard.may_rewind:
        raise stopped_by(bad, guard, last_good)
    run.batches.close()
    run.writer.close()
    run.state = None  # two states need not fit into memory
    with ledger.phase("checkpoint"):
        good = lambda step: guard.is_good(step, bad.step)
        restored = restore_newest(run.places, run.programs.abstract, run.say, good)
        if restored is not None:
            found = from_checkpoint(restored)
        elif _may_begin_again(run, bad):
            found = run.from_nothing()
        else:
            raise stopped_by(bad, guard, last_good)
        give_up_after(run, -1 if restored is None else found.step)
        run.go_from(found)
    entry = guard.rewind(bad, found.step, found.position)
    run.batches.skip(entry["skipped"])
    run.say(rewind_line(entry, len(guard.rewound), guard.config.most_rewinds))


def _may_begin_again(run: "Run", bad: BadStep) -> bool:
    """Whether step 0 is the last good state: the seed makes it, and no checkpoint was due."""
    due, steps = run.config.checkpoint.due, run.config.train.steps
    early = not any(due(step, steps) for step in range(1, bad.step - 1))
    return "from" not in run.directory.record and early and run.guard.is_good(0, bad.step)
