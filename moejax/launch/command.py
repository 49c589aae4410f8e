"""``moejax launch``: starts ``moejax train`` as several processes of this machine."""

import argparse
import contextlib
import pathlib
import sys
import tempfile

from moejax.config import UserError
from moejax.cost import segments
from moejax.launch.shares import free_port, shares
from moejax.launch.supervisor import Outcome, Supervisor, describe

OWN = ("--coordinator", "--process-id", "--processes")


def launch(options: argparse.Namespace) -> int:
    """Runs a job and watches over it; returns its exit status.

    Args:
      options: ``processes``, ``devices_per_process``, ``timeout_after_stall``, and ``rest``: the
        command line of ``moejax train``.

    Raises:
      UserError: flags that cannot be used.
    """
    workdir = _workdir(options.rest)
    if options.timeout_after_stall <= 0:
        raise UserError(
            f"--timeout-after-stall = {options.timeout_after_stall}: must be above zero"
        )
    parts = shares(options.processes, options.devices_per_process)
    port = free_port()
    commands = [
        [
            sys.executable, "-m", "moejax.launch.child", *options.rest,
            f"--coordinator=127.0.0.1:{port}", f"--process-id={number}",
            f"--processes={options.processes}",
        ]
        for number in range(options.processes)
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="moejax-launch-") as folder,
        Supervisor(
            commands, parts, pathlib.Path(folder), stall_seconds=options.timeout_after_stall
        ) as job,
    ):
        outcome = job.wait()
        first = job.children[0].process.pid
    if outcome.reason:
        text = describe(outcome)
        print(f"moejax launch: {text}", file=sys.stderr, flush=True)
        _close_ledger(workdir, first, text)
    return _status(outcome)


def _status(outcome: Outcome) -> int:
    return outcome.status if outcome.status in (0, 1, 2) else 1


def _workdir(rest: list[str]) -> pathlib.Path:
    """The work directory of the command line to be started, which is read as the processes will.

    Raises:
      UserError: it is none of ``moejax train``, or has flags that are the launcher's to give.
    """
    from moejax.cli import parser_of_commands

    if not rest or rest[0] != "train":
        raise UserError("give what to start after --: -- train --config=FILE --workdir=DIR")
    given = [flag for flag in OWN if any(word.split("=")[0] == flag for word in rest)]
    if given:
        raise UserError(f"{given[0]} is what moejax launch gives each process itself; leave it out")
    words = [word for word in rest if not word.startswith("--config.")]
    return pathlib.Path(parser_of_commands().parse_args(words).workdir)


def _close_ledger(workdir: pathlib.Path, pid: int, reason: str) -> None:
    """Closes the run's ledger as failed where process 0 could not."""
    with contextlib.suppress(OSError, UserError):
        segments.close_for(workdir / segments.FILE_NAME, pid, reason)
