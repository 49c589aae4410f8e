"""What each of a launch's processes may use of this machine: devices, cores, a port to meet at."""

import dataclasses
import os
import re
import socket
from collections.abc import Mapping

from moejax.config import UserError
from moejax.parallel.processes import visible_gpus

HOST_DEVICES = "--xla_force_host_platform_device_count"
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Share:
    """One process's part.

    Attributes:
      environment: variables that choose its devices.
      cores: those that it is pinned to; empty where there are fewer cores than processes.
    """

    environment: Mapping[str, str]
    cores: tuple[int, ...] = ()


def shares(
    processes: int, devices: int | None, environment: Mapping[str, str] = os.environ
) -> list[Share]:
    """Equal parts: of the GPUs where there are any and jax is not kept to the CPU, else of cores.

    Args:
      processes: P.
      devices: of each process; None for all GPUs there are, or one device of a CPU.
      environment: variables of the launcher.

    Raises:
      UserError: numbers below one, or more GPUs than there are.
    """
    for flag, value in (("--processes", processes), ("--devices-per-process", devices)):
        if value is not None and value < 1:
            raise UserError(f"{flag} = {value}: must be above zero")
    platform = environment.get("JAX_PLATFORMS", "")
    gpus = 0 if platform == "cpu" else visible_gpus(environment)
    cores = _cores(processes)
    if gpus:
        each = devices or gpus // processes
        if each * processes > gpus or each == 0:
            raise UserError(
                f"--processes = {processes}: {processes} x {each or 1} devices are more than the "
                f"{gpus} GPUs here; ask for fewer, or set JAX_PLATFORMS=cpu"
            )
        named = environment.get(GPU_VARIABLE, ",".join(map(str, range(gpus)))).split(",")
        parts = [named[i * each : (i + 1) * each] for i in range(processes)]
        return [
            Share({GPU_VARIABLE: ",".join(part)}, own)
            for part, own in zip(parts, cores, strict=True)
        ]
    rest = re.sub(rf"{HOST_DEVICES}=\S+", "", environment.get("XLA_FLAGS", ""))
    flags = f"{rest} {HOST_DEVICES}={devices or 1}".strip()
    return [Share({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, own) for own in cores]


def _cores(processes: int) -> list[tuple[int, ...]]:
    """Cores of each process; a core less for some would make the others wait for them."""
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(known) // processes
    return [tuple(known[i * each : (i + 1) * each]) for i in range(processes)]


def free_port() -> int:
    """A port of this machine that nobody listens at just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
