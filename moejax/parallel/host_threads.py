"""Threads for several devices of a CPU.

XLA's CPU client runs all devices of a process on one pool of as many threads as there are cores, or
devices if those are more. A collective holds its thread until its peers arrive, and a device may
hold several at once; with none left for a device that has yet to arrive, the program stands still
and jax ends the process after 40 seconds. More threads than collectives can hold cost nothing.
"""

import os
from collections.abc import MutableMapping

_COUNT = "--xla_force_host_platform_device_count="
_THREADS = "PJRT_NPROC"  # read by XLA as the client is made
EACH = 8  # threads of a device: more collectives than it has at once


def enough_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Asks for enough threads, where XLA_FLAGS make several devices of a CPU.

    To be called before jax looks for devices. What the user has set stays.
    """
    flags = environment.get("XLA_FLAGS", "").split()
    counts = [flag.removeprefix(_COUNT) for flag in flags if flag.startswith(_COUNT)]
    devices = int(counts[-1]) if counts and counts[-1].isdigit() else 1
    if devices > 1 and not {_THREADS, "NPROC"} & environment.keys():
        environment[_THREADS] = str(max(os.cpu_count() or 1, EACH * devices))
