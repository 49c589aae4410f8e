"""Energy counters of a machine: NVML's of NVIDIA GPUs, RAPL's of CPUs.

A counter is made at a moment and asked for the joules since it was last asked. Whatever keeps one
from being read is raised as ``Unreadable`` with the reason in a few words.
"""

import os
import pathlib
import time
import types
from collections.abc import Callable, Sequence
from typing import Protocol

POWERCAP = pathlib.Path("/sys/class/powercap")


class Unreadable(Exception):
    """Why a counter cannot be read."""


class Counter(Protocol):
    """Joules since it was made, or last asked."""

    def delta(self) -> float:
        """Joules since the last call; raises Unreadable."""
        ...


def load_nvml() -> types.ModuleType:
    """The bindings of NVIDIA's management library, initialised; raises Unreadable."""
    try:
        import pynvml
    except ImportError:
        raise Unreadable("nvidia-ml-py is not installed: pip install 'moejax[energy]'") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unreadable(f"NVML: {error}") from None
    return pynvml


class NvmlCounter:
    """One GPU's total-energy counter, or its power in samples where it has none (before Volta).

    Args:
      nvml: the initialised bindings.
      handle: the GPU's.
      clock: seconds, for the samples.
    """

    def __init__(self, nvml: types.ModuleType, handle, clock: Callable[[], float] = time.monotonic):
        self._nvml, self._handle, self._clock = nvml, handle, clock
        self._power_at: tuple[float, float] | None = None
        self._millijoules = 0
        try:
            if nvml.nvmlDeviceGetMigMode(handle)[0]:
                raise Unreadable("the GPU is cut into MIG slices, and only the whole is counted")
        except nvml.NVMLError:
            pass  # a GPU that knows no MIG
        try:
            self._millijoules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError_NotSupported:
            self._power_at = self._power()
        except nvml.NVMLError as error:
            raise Unreadable(f"NVML: {error}") from None

    def delta(self) -> float:
        """Joules since the last call.

        The counter starts again when the driver does; what it had counted since the last call is
        lost then.
        """
        if self._power_at is not None:
            (then, before), (now, power) = self._power_at, self._power()
            self._power_at = now, power
            return (now - then) * (before + power) / 2
        try:
            now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise Unreadable(f"NVML: {error}") from None
        grown = now - self._millijoules if now >= self._millijoules else now
        self._millijoules = now
        return grown / 1e3

    def _power(self) -> tuple[float, float]:
        """(When, watts)."""
        try:
            return self._clock(), self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
        except self._nvml.NVMLError as error:
            raise Unreadable(f"NVML: {error}") from None


def gpu_counters(nvml: types.ModuleType, ordinals: Sequence[int]) -> list[NvmlCounter]:
    """Counters of the GPUs that CUDA knows by these ordinals.

    NVML counts all of a machine's GPUs in the order of the bus; CUDA only those of
    CUDA_VISIBLE_DEVICES, and unless told otherwise the fastest first.

    Raises:
      Unreadable: no such GPU, one that cannot be told for certain, or one without counters.
    """
    try:
        count = nvml.nvmlDeviceGetCount()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        kinds = {nvml.nvmlDeviceGetName(handle) for handle in handles}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = [str(i) for i in range(count)] if visible is None else visible.split(",")
        if any(i >= len(words) for i in ordinals):
            raise Unreadable(f"CUDA_VISIBLE_DEVICES names {len(words)} GPUs, jax has more")
        return [
            NvmlCounter(nvml, _handle(nvml, words[i].strip(), handles, kinds)) for i in ordinals
        ]
    except nvml.NVMLError as error:
        raise Unreadable(f"NVML: {error}") from None


def _handle(nvml: types.ModuleType, word: str, handles: list, kinds: set):
    """A GPU by a word of CUDA_VISIBLE_DEVICES."""
    if word.startswith("MIG-"):
        raise Unreadable("the GPU is a MIG slice, and only the whole is counted")
    if word.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(word)
    if not word.isdigit() or int(word) >= len(handles):
        raise Unreadable(f"CUDA_VISIBLE_DEVICES has {word!r}, which is none of the GPUs here")
    if len(kinds) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise Unreadable("GPUs of several kinds: set CUDA_DEVICE_ORDER=PCI_BUS_ID to tell them")
    return handles[int(word)]


class RaplCounter:
    """One zone of Linux's powercap tree, for example a CPU package.

    Args:
      zone: its folder.
    """

    def __init__(self, zone: pathlib.Path):
        self._zone = zone
        self._range = _number(zone / "max_energy_range_uj")
        self._microjoules = _number(zone / "energy_uj")

    def delta(self) -> float:
        """Joules since the last call; the counter wraps after some 260 kJ, which is mended."""
        now = _number(self._zone / "energy_uj")
        grown = now - self._microjoules
        if grown < 0:
            grown += self._range
        self._microjoules = now
        return grown / 1e6


def cpu_counters(powercap: pathlib.Path = POWERCAP) -> list[RaplCounter]:
    """Counters of every CPU package of this machine and, where they are apart, of its memory.

    Raises:
      Unreadable: no counters, as in most virtual machines, or none that this user may read.
    """
    zones = []
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's have this name too
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        if name.startswith("package") or name == "dram":
            zones.append(zone)
    if not zones:
        raise Unreadable(f"no CPU energy counters (RAPL) in {powercap}")
    return [RaplCounter(zone) for zone in zones]


def _number(path: pathlib.Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError:
        raise Unreadable(f"permission denied: {path} (only root may read it by default)") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path}: {error}") from None
