"""What a run's devices consumed, measured where the machine has counters that can be read.

A meter never stops a run: where nothing can be measured, or no longer, it says why, and the bill
has an estimate instead. What is measured is the devices alone; the bill multiplies it by the
server's share and the data centre's (``moejax.cost.energy.overhead``) and says so.
"""

import contextlib
import os
import pathlib
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

from moejax.cost import energy
from moejax.cost.counters import (
    POWERCAP,
    Counter,
    Unreadable,
    cpu_counters,
    gpu_counters,
    load_nvml,
)

NVML, RAPL = "measured (NVML)", "measured (RAPL)"


class EnergyMeter:
    """Sums up counters from its making on; make it with ``open_meter``.

    Any thread may read. Once a counter fails, nothing is added any more, and ``reason`` says why.

    Attributes:
      source: ``measured (NVML)``, ``measured (RAPL)`` or ``estimate``.
      devices: billed devices whose energy is measured; 0 for an estimate.
      includes: what is measured, in words; empty for an estimate.
      reason: why nothing is measured, or no longer; empty while it is.

    Args:
      counters: what to sum; none for an estimate.
      share: part of the sum that belongs to the run.
      clock: seconds.
      close: called once at the end.
    """

    def __init__(
        self,
        source: str,
        counters: Sequence[Counter] = (),
        *,
        devices: int = 0,
        share: float = 1.0,
        includes: str = "",
        reason: str = "",
        clock: Callable[[], float] = time.monotonic,
        close: Callable[[], None] = lambda: None,
    ):
        self.source, self.devices, self.includes, self.reason = source, devices, includes, reason
        self._counters, self._share = list(counters), share
        self._clock, self._close = clock, close
        self._since = clock()
        self._joules = self._seconds = 0.0
        self._lock = threading.Lock()

    def read(self) -> tuple[float, float]:
        """Joules since the making, and the seconds that they cover; both 0 for an estimate."""
        with self._lock:
            if self._counters:
                try:
                    grown = sum([counter.delta() for counter in self._counters])
                except Unreadable as error:
                    self._counters, self.reason = [], str(error)
                else:
                    self._joules += grown * self._share
                    self._seconds = self._clock() - self._since
            return self._joules, self._seconds

    def describe(self) -> dict[str, Any]:
        """``source``, ``devices``, ``includes`` and ``reason``, JSON-ready."""
        names = ("source", "devices", "includes", "reason")
        return {name: getattr(self, name) for name in names}

    def close(self) -> None:
        """Lets go of the counters; a later reading repeats the last."""
        with self._lock:
            self._counters = []
            close, self._close = self._close, lambda: None
        close()


def open_meter(
    hardware: str,
    devices: Sequence[Any],
    billed: int,
    *,
    nvml: Callable[[], types.ModuleType] = load_nvml,
    powercap: pathlib.Path = POWERCAP,
) -> EnergyMeter:
    """The best meter that this machine has.

    Args:
      hardware: the chip that the run is billed as.
      devices: this process's ``jax.Device``s of the run.
      billed: devices billed on this host: as many, or on a CPU its cores.
      nvml: loads the bindings.
      powercap: Linux's folder of CPU counters.

    Returns:
      A meter; one whose source is ``estimate`` has the reason.
    """
    platform = devices[0].platform
    try:
        if (hardware == "cpu") != (platform == "cpu"):
            raise Unreadable(f"billed as {hardware}, but run on a {platform}")
        if platform == "cpu":
            return _cpu_meter(billed, powercap)
        if platform == "gpu":
            return _gpu_meter([device.local_hardware_id for device in devices], nvml())
        raise Unreadable(f"no counter of a {platform} is known")
    except Unreadable as error:
        return EnergyMeter(energy.SOURCE, reason=str(error))


def _gpu_meter(ordinals: Sequence[int], nvml: types.ModuleType) -> EnergyMeter:
    def shutdown() -> None:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()

    try:
        counters = gpu_counters(nvml, ordinals)
    except Unreadable:
        shutdown()
        raise
    return EnergyMeter(
        NVML, counters, devices=len(ordinals), close=shutdown,
        includes="whole GPU boards with their memory; not the server's CPUs, fans and losses",
    )  # fmt: skip


def _cpu_meter(cores: int, powercap: pathlib.Path) -> EnergyMeter:
    total = os.cpu_count() or cores
    return EnergyMeter(
        RAPL, cpu_counters(powercap), devices=cores, share=min(cores / total, 1.0),
        includes=f"CPU packages and memory, the share of {cores} of {total} cores; not the rest "
        "of the server",
    )  # fmt: skip
