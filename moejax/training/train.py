"""From a config to a finished run directory: what opens, runs and closes a run."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from moejax.config import UserError
from moejax.cost.ledger import Ledger, process_age
from moejax.cost.meter import open_meter
from moejax.parallel import heartbeat, together
from moejax.training import charge_exchange, prepare, run_dir, several
from moejax.training.loop import Interrupted, Run, RunFailed
from moejax.training.programs import ProgramCache, Programs, compile_programs
from moejax.training.run_config import RunConfig
from moejax.training.signals import StopRequest
from moejax.training.summary import summarize


def train(
    config: RunConfig,
    workdir: str,
    *,
    bill_process: bool = False,
    begun: float | None = None,
    programs: ProgramCache | None = None,
) -> dict[str, Any]:
    """Trains a model, or goes on with the run that ``workdir`` holds.

    Args:
      config: the run.
      workdir: its folder.
      bill_process: charge the time since this process began as start-up, not just since this
        call: for a process that does nothing else.
      begun: ``time.monotonic()`` when the work for this run began, which is charged as start-up;
        None for this call.
      programs: where runs of this process find one another's compiled programs.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UserError: a config, corpus or folder that cannot be used; nothing has been written then.
      RunFailed: the run stopped on an error, or was interrupted before a step ended (Interrupted);
        its last good checkpoint stands.
    """
    if bill_process:
        begun = time.monotonic() - process_age()
    elif begun is None:
        begun = time.monotonic()
    setup, directory, path = several.open_setup(config, workdir)
    done = together.decide(directory.finished)
    if done is not None:
        if together.index() == 0:
            print(f"{workdir}: the run is complete; nothing to do", file=sys.stderr)
        return done
    with several.created(directory, setup.dataset):
        billing, first = setup.billing, together.index() == 0
        ledger = Ledger.open(
            path / run_dir.LEDGER if first else os.devnull,
            run_id=path.name,
            stage=config.stage,
            hardware=billing.hardware,
            devices=billing.devices,
            price=billing.price,
            peak_flops=billing.peak_flops,
            final=config.cost.final,
            region=config.cost.region,
            exchange=charge_exchange.describe(setup),
            plan=prepare.plan_run(setup),
            pue=config.cost.pue,
            purchase=config.cost.purchase(billing.hardware),
            dollars_per_kwh=config.cost.dollars_per_kwh,
            meter=open_meter(billing.hardware, setup.mesh.local_devices, billing.devices)
            if first
            else None,
            backfill_seconds=time.monotonic() - begun,
            on_phase=heartbeat.beats(),
        )
        return _run(setup, directory, ledger, programs.get if programs else compile_programs)


def _run(
    setup: prepare.Setup,
    directory: run_dir.RunDirectory,
    ledger: Ledger,
    programs: Callable[[prepare.Setup], Programs],
) -> dict[str, Any]:
    """The run itself, from an open ledger to a closed one, whatever happens."""
    status, run = "failed", None
    try:
        with StopRequest() as stop, jax.set_mesh(setup.mesh):
            run = Run(setup, directory, ledger, stop, programs)
            try:
                run.start()
                status = run.train()
                run.finish(status)
            except BaseException:
                status = "failed"
                raise
            finally:
                run.close()
    except KeyboardInterrupt:
        status = "interrupted"
        raise Interrupted("interrupted before the step ended; the last checkpoint stands") from None
    except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
        # The config was good, so what went wrong now is the run's: a full disk, no memory.
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise RunFailed(first[0]) from error
    finally:
        ledger.close(status)
        if run is not None and together.index() == 0:
            directory.write_summary(summarize(run, status))
    return summarize(run, status)
