"""From a config to a finished run directory: what opens, runs and closes a run."""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moejax.config import UserError
from moejax.cost.ledger import Ledger
from moejax.cost.meter import open_meter
from moejax.cost.segments import process_age
from moejax.parallel import heartbeat, together
from moejax.training import charge_exchange, prepare, run_dir, several
from moejax.training.failures import Interrupted, InterruptedAtOnce, RunFailed
from moejax.training.loop import Run
from moejax.training.programs import ProgramCache, compile_programs
from moejax.training.run_config import RunConfig
from moejax.training.signals import StoppedAtOnce, StopRequest
from moejax.training.summary import summarize


def train(
    config: RunConfig,
    workdir: str,
    *,
    bill_process: bool = False,
    begun: float | None = None,
    programs: ProgramCache | None = None,
    resume_from: int | None = None,
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
      resume_from: go on from exactly this step's checkpoint, and give up what came after it, also
        of a run that is complete; None for the newest good one.

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
    with StopRequest() as stop:
        try:
            with stop.at_once():
                setup, directory, path = several.open_setup(config, workdir, resume_from)
        except StoppedAtOnce:
            raise Interrupted(f"{stop.name}: before it began; nothing was written") from None
        done = together.decide(directory.finished)
        if done is not None and resume_from is None:
            if together.index() == 0:
                print(f"{workdir}: the run is complete; nothing to do", file=sys.stderr)
            return done
        compiled = programs.get if programs else compile_programs
        with several.created(directory, setup.dataset):
            ledger = open_ledger(
                setup.config, setup.billing, setup.mesh, path, begun,
                plan=prepare.plan_run(setup), exchange=charge_exchange.describe(setup),
            )  # fmt: skip
            start = lambda: Run(setup, directory, ledger, stop, compiled, resume_from)
            return run_whole(start, setup.mesh, directory, ledger, stop, summarize)


def open_ledger(
    config: RunConfig,
    billing: prepare.Billing,
    mesh: jax.sharding.Mesh,
    path: pathlib.Path,
    begun: float,
    *,
    plan: Mapping[str, Any] | None = None,
    exchange: Mapping[str, Any] | None = None,
) -> Ledger:
    """The ledger of a run in the folder ``path``; the time since ``begun`` is start-up's."""
    first = together.index() == 0
    meter = open_meter(billing.hardware, mesh.local_devices, billing.devices) if first else None
    return Ledger.open(
        path / run_dir.LEDGER if first else os.devnull,
        run_id=path.name,
        stage=config.stage,
        hardware=billing.hardware,
        devices=billing.devices,
        price=billing.price,
        peak_flops=billing.peak_flops,
        final=config.cost.final,
        region=config.cost.region,
        exchange=exchange,
        plan=plan,
        pue=config.cost.pue,
        purchase=config.cost.purchase(billing.hardware),
        dollars_per_kwh=config.cost.dollars_per_kwh,
        meter=meter,
        backfill_seconds=time.monotonic() - begun,
        on_phase=heartbeat.beats(),
    )


def run_whole(
    make_run: Callable[[], Any],
    mesh: jax.sharding.Mesh,
    directory: run_dir.RunDirectory,
    ledger: Ledger,
    stop: StopRequest,
    summarize: Callable[[Any, str], dict[str, Any]],
) -> dict[str, Any]:
    """The run itself, from an open ledger to a closed one, whatever happens.

    Args:
      make_run: gives the loop: ``start()``, ``train()`` and ``finish(status)``, which give the
        ledger's status, and ``close()``.
      mesh: is the current one meanwhile.
      directory: takes the summary.
      ledger: is closed.
      stop: ends a start at once.
      summarize: what ``summary.json`` holds, of a loop and a status.

    Raises:
      RunFailed: see ``train``.
    """
    status, run, failed = "failed", None, True
    try:
        with jax.set_mesh(mesh):
            run = make_run()
            try:
                with stop.at_once():
                    run.start()
                status = run.finish(run.train())
            except BaseException:
                status = "failed"
                raise
            finally:
                run.close()
        failed = False
    except StoppedAtOnce:
        status = "interrupted"
        raise InterruptedAtOnce(f"{stop.name}: before its first step; nothing is lost") from None
    except KeyboardInterrupt:
        status = "interrupted"
        raise Interrupted("interrupted before the step ended; the last checkpoint stands") from None
    except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
        # The config was good, so what went wrong now is the run's: a full disk, no memory.
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise RunFailed(first[0]) from error
    finally:
        told = None if run is None or together.index() else summarize(run, status)
        _close(directory, ledger, status, told, failed)
    return summarize(run, status)


def _close(
    directory: run_dir.RunDirectory,
    ledger: Ledger,
    status: str,
    summary: dict[str, Any] | None,
    failed: bool,
) -> None:
    """Closes the ledger and writes the summary, as far as the disk takes them.

    Raises:
      RunFailed: it does not, and nothing else went wrong, which would be the thing to say.
    """
    for name, write in (
        (run_dir.LEDGER, lambda: ledger.close(status)),
        (run_dir.SUMMARY, lambda: summary is not None and directory.write_summary(summary)),
    ):
        try:
            write()
        except OSError as error:
            text = f"{directory.path / name} cannot be written: {error.strerror or error}"
            if not failed:
                raise RunFailed(f"{text}; the checkpoints are safe") from error
            print(f"warning: {text}", file=sys.stderr, flush=True)
