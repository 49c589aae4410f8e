"""What opens, runs and closes the run of a stage, whichever it is."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from moejax.cost.ledger import Ledger
from moejax.cost.segments import process_age
from moejax.training import run_dir, several
from moejax.training.failures import Interrupted
from moejax.training.prepare import Billing
from moejax.training.run_dir import RunDirectory
from moejax.training.signals import StoppedAtOnce, StopRequest
from moejax.training.train import open_ledger, run_whole


@dataclasses.dataclass(frozen=True)
class Opened:
    """A stage that can run.

    Attributes:
      directory: its folder.
      asked: what stands for a corpus in the record.
      charged: the config whose blocks ``stage`` and ``cost`` say how it is charged.
      billing: by which rate.
      mesh: where it runs.
      make: the loop, from a ledger and a stop request; see ``run_whole``.
      summarize: what ``summary.json`` holds, of the loop and a status.
      plan: the bill before the run; None without one.
    """

    directory: RunDirectory
    asked: Any
    charged: Any
    billing: Billing
    mesh: jax.sharding.Mesh
    make: Callable[[Ledger, StopRequest], Any]
    summarize: Callable[[Any, str], dict[str, Any]]
    plan: dict[str, Any] | None = None


def run_stage(
    opened: Callable[[pathlib.Path], Opened], workdir: str, bill_process: bool
) -> dict[str, Any]:
    """Runs a stage in its folder, or finds it done.

    Args:
      opened: checks the stage against the folder, and writes nothing.
      workdir: the folder.
      bill_process: charge the time since this process began as start-up.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UserError: it cannot run; nothing has been written then.
      RunFailed: it stopped on an error.
    """
    begun = time.monotonic() - (process_age() if bill_process else 0.0)
    with StopRequest() as stop:
        try:
            with stop.at_once():
                stage = opened(run_dir.check_workdir(workdir))
        except StoppedAtOnce:
            raise Interrupted(f"{stop.name}: before it began; nothing was written") from None
        directory = stage.directory
        done = directory.finished()
        if done is not None:
            print(f"{workdir}: the run is complete; nothing to do", file=sys.stderr)
            return done
        with several.created(directory, stage.asked):
            ledger = open_ledger(
                stage.charged, stage.billing, stage.mesh, directory.path, begun, plan=stage.plan
            )
            make = lambda: stage.make(ledger, stop)
            return run_whole(make, stage.mesh, directory, ledger, stop, stage.summarize)
