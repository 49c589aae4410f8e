"""Parts of this machine for cells that run side by side, so that each is billed for its own.

Losses on a CPU depend on the number of cores in their last digits: all cells get equally many.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator

from moejax.config import check
from moejax.cost.hardware import cpu_cores

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
# Of a process that only plans: it must leave a GPU's memory to the cells that run there.
PLANNING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process may use.

    Attributes:
      cores: numbers of the cores that it is pinned to; None for any.
      gpu: name of the one GPU that it sees; None for all.
    """

    cores: tuple[int, ...] | None = None
    gpu: str | None = None

    def environment(self) -> dict[str, str]:
        """The variables that a process with this share gets."""
        return {} if self.gpu is None else {GPU_VARIABLE: self.gpu}

    def pin(self) -> None:
        """Pins this process to the share's cores; threads that run already stay where they are."""
        if self.cores is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)


def gpus(devices: pathlib.Path = pathlib.Path("/dev")) -> list[str]:
    """GPUs that this process may use, without waking jax; none where jax is kept to the CPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    named = os.environ.get(GPU_VARIABLE)
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    found = [re.fullmatch(r"nvidia(\d+)", path.name) for path in devices.glob("nvidia*")]
    return sorted((match[1] for match in found if match), key=int)


def shares(processes: int) -> list[Share]:
    """Equal shares of this machine; one that has everything for ``processes`` = 0.

    Raises:
      ConfigError: more processes than GPUs, or than cores.
    """
    check(processes >= 0, "--processes", processes, "must not be below zero")
    if processes == 0:
        return [Share()]
    chips = gpus()
    if chips:
        check(
            processes <= len(chips), "--processes", processes,
            f"there are {len(chips)} GPUs, and cells that share one would each be billed for all "
            "of it; use fewer",
        )  # fmt: skip
        return [Share(gpu=chip) for chip in chips[:processes]]
    known = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cpu_cores())
    cores = sorted(known)[: cpu_cores()]
    check(
        processes <= len(cores), "--processes", processes,
        f"there are {len(cores)} cores; use as many or fewer",
    )  # fmt: skip
    each = len(cores) // processes
    return [Share(cores=tuple(cores[i * each : (i + 1) * each])) for i in range(processes)]


@contextlib.contextmanager
def within(share: Share, planning: bool = False) -> Iterator[None]:
    """Keeps this process to a share for a while: what is planned and measured is one cell's.

    Args:
      share: which.
      planning: whether this process computes nothing itself.
    """
    before = os.sched_getaffinity(0) if share.cores is not None else None
    values = share.environment() | (PLANNING if planning else {})
    kept = {name: os.environ.get(name) for name in values}
    share.pin()
    os.environ.update(values)
    try:
        yield
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
