"""What a run of several processes opens: the same on all, and only process 0's on the disk."""

import contextlib
import dataclasses
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from moejax.config import UserError
from moejax.cost import hardware
from moejax.parallel import together
from moejax.training import local_copies, prepare, run_dir, start
from moejax.training.run_config import RunConfig, flat

VISIBLE_SECONDS = 10.0  # for a shared file system to show what another machine wrote


def open_setup(
    config: RunConfig, workdir: str, resume_from: int | None = None
) -> tuple[prepare.Setup, run_dir.RunDirectory, pathlib.Path]:
    """Checks a run against devices, text and folder, on all processes, and compares what they find.

    Args:
      config: the run.
      workdir: its folder.
      resume_from: a step that has to have a checkpoint there; None for none.

    Raises:
      UserError: it fails on one of them, or they do not agree.
    """

    def work() -> tuple[prepare.Setup, run_dir.RunDirectory, pathlib.Path]:
        path = run_dir.check_workdir(workdir)
        if resume_from is not None:
            run_dir.check_step(path, resume_from)
        local_copies.check_folder(config.checkpoint)
        setup = prepare.prepare(config)
        directory = run_dir.open_run(path, setup.config, setup.dataset)
        return setup, start.recorded_in(directory, setup), path

    setup, directory, path = together.agreed(work, lambda found: _compared(found[1]))
    if together.count() > 1:
        setup = dataclasses.replace(setup, billing=_billing(setup))
    return setup, directory, path


def _compared(directory: run_dir.RunDirectory) -> dict[str, Any]:
    """What has to be the same on all processes, by the name that a difference is told with."""
    record = directory.record
    return {
        **{f"config.{name}": value for name, value in flat(record["config"]).items()},
        "code": record["code"],
        "packages": record["packages"],
        "python": record["python"],
        "corpus": record["data"]["fingerprint"],
        "--workdir": "a run's" if directory.resumed else "new",
        "start": record.get("start"),
        "distill": record.get("distill"),
    }


def _billing(setup: prepare.Setup) -> prepare.Billing:
    """The bill's figures for the cores of all processes, where cores are what is billed.

    Process 0 measures while the others wait: side by side they would slow one another.
    """
    billing = setup.billing
    if billing.hardware != "cpu":
        return billing
    cores = total_cores()
    peak, source = together.decide(lambda: hardware.peak_flops("cpu", cores))
    return dataclasses.replace(billing, devices=cores, peak_flops=peak, peak_source=source)


def total_cores() -> int:
    """Cores that the processes of a job may use, each counted once however many share it."""
    affinity = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    )
    own = [socket.gethostname(), sorted(affinity), hardware.cpu_cores()]
    cores: dict[str, set[int]] = {}
    quota: dict[str, int] = {}
    for host, allowed, usable in together.exchange(own):
        cores.setdefault(host, set()).update(allowed)
        if usable < len(allowed):
            quota[host] = usable
    return sum(min(len(found), quota.get(host, len(found))) for host, found in cores.items())


@contextlib.contextmanager
def created(directory: run_dir.RunDirectory, dataset: Any) -> Iterator[None]:
    """Process 0 writes the folder and holds it; the others see that it is the same one.

    Raises:
      UserError: it cannot be written, another job trains in it, or a process does not see it.
    """
    with contextlib.ExitStack() as held:
        if together.index() == 0:
            together.agreed(lambda: held.enter_context(directory.create(dataset)))
        else:
            together.agreed(lambda: None)
        together.agreed(lambda: _sees(directory.path))
        yield


def _sees(path: pathlib.Path) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while together.count() > 1 and not (path / run_dir.CONFIG).is_file():
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir = {str(path)!r}: {socket.gethostname()} does not see what process 0 "
                "wrote there; use a file system that all machines share"
            )
        time.sleep(0.2)
