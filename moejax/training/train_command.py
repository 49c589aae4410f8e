"""``moejax train``: one process, or this process's part of a job of several."""

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config import UserError, visible
from moejax.cost import starting

# Environment: a process's number under SLURM, Open MPI and in Kubernetes' indexed Jobs.
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of run that is not training on text.

    Attributes:
      read: from the blocks of a config file to its config; raises ConfigError.
      train: as ``moejax.training.train.train``.
      show: its summary, and the run's folder, as text for people.
    """

    read: Callable[[Mapping[str, Any]], Any]
    train: Callable[..., dict[str, Any]]
    show: Callable[[dict[str, Any], str], str]


# The stage that a config's blocks belong to; None for training on text.
Stages = Callable[[Mapping[str, Any]], Stage | None]


def run(
    options: argparse.Namespace, show: Callable[[dict[str, Any], str], None], stages: Stages
) -> int:
    """Trains; returns 0, 1 for a run that failed or was interrupted, 2 for a user's mistake.

    Args:
      options: ``config``, ``overrides``, ``workdir``, ``resume_from``, ``coordinator``,
        ``process_id``, ``processes``.
      show: takes the summary, and the same as text.
      stages: knows the kinds of runs that are not training on text.

    Raises:
      UserError: with one process; with several it is said here.
    """
    if _is_first(options.process_id):  # the ledger is process 0's
        starting.begin(options.workdir)
    try:
        return _run(options, show, stages)
    finally:
        starting.end()


def _is_first(process_id: int | None) -> bool:
    """Whether this may be process 0 of a job, before jax is there to tell."""
    if process_id is not None:
        return process_id == 0
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _run(options, show, stages: Stages) -> int:
    # Before jax is asked for its devices.
    from moejax.parallel import heartbeat, processes

    heartbeat.begin()
    place = processes.place_of(options.coordinator, options.process_id, options.processes)
    try:
        processes.start(place)
    except UserError as error:
        _say(place.index, str(error), None)
        starting.end()
        os._exit(2)  # jax's half-begun client may crash as the interpreter ends
    if place.count == 1:
        return _train(options, show, stages)[0]
    failed = True  # its peers must not wait for it then
    try:
        status, failed = _train(options, show, stages)
    except UserError as error:
        status = 2
        _say(place.index, str(error), error)
    except Exception as error:
        if "Gloo" in str(error):  # it is seldom more than a peer that has gone
            _say(place.index, f"lost a peer: {str(error).splitlines()[0]}", None)
        else:
            traceback.print_exc()
        status = 1
    return processes.leave(status, failed)


def _train(options, show, stages: Stages) -> tuple[int, bool]:
    """The exit status, and whether the run failed."""
    from moejax import config as mechanism
    from moejax.analysis.curves import loss_over_dollars
    from moejax.parallel import together
    from moejax.training import programs, report, run_config
    from moejax.training.failures import InterruptedAtOnce, RunFailed
    from moejax.training.train import train

    text = Stage(run_config.from_dict, train, report.format_summary)

    def read() -> tuple[Stage, Any]:
        values = mechanism.load(options.config, options.overrides)
        stage = stages(values) or text
        return stage, stage.read(values)

    try:
        stage, config = together.agreed(read)
        summary = stage.train(
            config, options.workdir, bill_process=True, resume_from=options.resume_from
        )
    except RunFailed as error:
        _say(together.index(), f"the run failed: {error}", error.__cause__)
        if isinstance(error, InterruptedAtOnce) and programs.compiling():
            os._exit(1)  # the interpreter would wait for the compiler
        return 1, True
    if together.index() == 0:
        try:
            if stage is text:
                loss_over_dollars(options.workdir)
        except OSError as error:
            print(f"warning: the figure of the loss cannot be written: {error}", file=sys.stderr)
        show(summary, stage.show(summary, options.workdir))
    return (1 if summary["status"] == "interrupted" else 0), False


def _say(index: int, text: str, error: BaseException | None) -> None:
    """An error in a line, with the process's number above 0; what a peer says is left to it."""
    from moejax.parallel.together import PeerError

    if not isinstance(error, PeerError):
        who = f"process {index}: " if index else ""
        print(visible(f"moejax train: {who}{text}"), file=sys.stderr, flush=True)
