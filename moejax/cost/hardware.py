"""Chips as a table: dense peaks, memory, links, power; and which of them this machine has.

Peaks are dense ones: several public tables list the sparse figures, twice as high, for the H100.
On a CPU the device that is billed is one core (a cloud's vCPU), and its peak is measured.
"""

import dataclasses
import math
import os
import pathlib
import time

from moejax.config import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
      name: as in ``cost.hardware``.
      bf16_flops: dense BF16 peak of one device, FLOP/s; None where it is measured (CPU).
      fp8_flops: dense FP8 peak, FLOP/s; None where the chip has no FP8 arithmetic.
      memory_bytes: memory of one device; None where it is not the device's own (CPU).
      bandwidth: of that memory, bytes/s.
      tdp_watts: thermal design power of one device; None where it is not published.
      link_bytes_per_s: NVLink, both directions together, bytes/s; None where there is none.
      server_multiplier: power of a server over that of its chips.
      power_fraction: average power drawn over that at full load.
      pue: power usage effectiveness of the data centre: 1.1 hyperscaler, else 1.25.
      source: where the figures are from.
    """

    name: str
    bf16_flops: float | None
    fp8_flops: float | None
    memory_bytes: float | None
    bandwidth: float | None
    tdp_watts: float | None
    link_bytes_per_s: float | None
    server_multiplier: float = 1.8
    power_fraction: float = 0.75
    pue: float = 1.25
    source: str = "maker's data sheet"


def _gpu(
    name: str, bf16_tflops: float, fp8_tflops: float | None, gb: float, tb_per_s: float,
    watts: float, nvlink_gb_per_s: float, server_multiplier: float = 1.8,
) -> Chip:  # fmt: skip
    """A GPU in the units of data sheets."""
    return Chip(
        name, bf16_tflops * 1e12, fp8_tflops and fp8_tflops * 1e12, gb * 1e9, tb_per_s * 1e12,
        watts, nvlink_gb_per_s * 1e9, server_multiplier,
    )  # fmt: skip


def _tpu(name: str, bf16_tflops: float, gb: float, tb_per_s: float, watts: float | None) -> Chip:
    """A TPU in the units of Google's documentation, which does not give newer ones' power."""
    return Chip(
        name, bf16_tflops * 1e12, None, gb * 1e9, tb_per_s * 1e12, watts, None,
        server_multiplier=1.56, power_fraction=0.43, pue=1.1, source="cloud.google.com/tpu/docs",
    )  # fmt: skip


# Server multipliers and power fractions: Epoch AI, training-cost-trends.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        #    name              BF16    FP8    GB  TB/s  W    NVLink
        _gpu("a100_80gb_sxm", 312.0, None, 80, 2.04, 400, 600, server_multiplier=2.03),
        _gpu("h100_sxm", 989.4, 1979.0, 80, 3.35, 700, 900, server_multiplier=1.82),
        # The export-restricted H100: same arithmetic, slower links.
        _gpu("h800_sxm", 989.4, 1979.0, 80, 3.36, 700, 400, server_multiplier=1.82),
        _gpu("h20", 148.0, 296.0, 96, 4.0, 400, 900),
        _gpu("h200_sxm", 989.4, 1979.0, 141, 4.8, 700, 900),
        _gpu("b200", 2250.0, 4500.0, 192, 8.0, 1000, 1800),
        _tpu("tpu_v4", 275.0, 32, 1.2, 170),
        _tpu("tpu_v5e", 197.0, 16, 0.82, 140),
        _tpu("tpu_v5p", 459.0, 95, 2.77, None),
        _tpu("tpu_v6e", 918.0, 32, 1.64, None),
        Chip(
            "cpu", None, None, None, None, tdp_watts=5.0, link_bytes_per_s=None,
            source="estimate: about 300 W for the 64 threads of a cloud server's Xeon; "
            "peak measured here",
        ),
    )
}  # fmt: skip

# jax's device kinds, lower case. Exact names only: an "H100 PCIe" or a MIG slice has other peaks.
DEVICE_KINDS = {
    "nvidia a100-sxm4-80gb": "a100_80gb_sxm",
    "nvidia h100 80gb hbm3": "h100_sxm",
    "nvidia h800": "h800_sxm",
    "nvidia h20": "h20",
    "nvidia h200": "h200_sxm",
    "nvidia b200": "b200",
    "tpu v4": "tpu_v4",
    "tpu v5 lite": "tpu_v5e",
    "tpu v5e": "tpu_v5e",
    "tpu v5": "tpu_v5p",
    "tpu v5p": "tpu_v5p",
    "tpu v6 lite": "tpu_v6e",
    "tpu v6e": "tpu_v6e",
}


def lookup(name: str) -> Chip:
    """The chip of that name.

    Raises:
      ConfigError: no such chip; the nearest is offered.
    """
    if name not in CHIPS:
        raise ConfigError("cost.hardware", name, f"no such chip; {nearest(name, CHIPS)}")
    return CHIPS[name]


def detect(platform: str, device_kind: str) -> str:
    """The chip's name from what jax says of a device.

    Args:
      platform: ``jax.Device.platform``.
      device_kind: ``jax.Device.device_kind``.

    Raises:
      ConfigError: a device that is not in the table; ``cost.hardware`` must name it.
    """
    if platform == "cpu":
        return "cpu"
    name = DEVICE_KINDS.get(device_kind.lower().strip())
    if name is None:
        raise ConfigError(
            "cost.hardware", "auto",
            f"cannot tell the chip of device kind {device_kind!r}; "
            f"set it to the nearest of: {', '.join(CHIPS)}",
        )  # fmt: skip
    return name


def cpu_cores(quota: pathlib.Path = pathlib.Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: the number of devices billed on a CPU.

    The fewest of the machine's, those it is pinned to, and a container's quota, rounded up.

    Args:
      quota: Linux's file of the quota: microseconds of CPU time in a period, and the period.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        time, period = quota.read_text().split()
        return min(cores, math.ceil(int(time) / int(period)))
    except (OSError, ValueError):  # no such file, or ``max``: no quota
        return cores


def measure_cpu_peak(seconds: float = 0.3) -> float:
    """FLOP/s of this host, all of its cores together: the fastest FP32 1024³ matrix product.

    Args:
      seconds: how long to try, compilation aside; at least two products are timed.

    Returns:
      FLOP/s of the host, not of one core: divide by ``cpu_cores()`` for that.
    """
    import jax
    import jax.numpy as jnp

    size = 1024
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        matrix = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul)
        product(matrix, matrix).block_until_ready()
        fastest, runs, stop = float("inf"), 0, time.perf_counter() + seconds
        while runs < 2 or time.perf_counter() < stop:
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            fastest = min(fastest, time.perf_counter() - start)
            runs += 1
    return 2.0 * size**3 / fastest


def peak_flops(name: str, devices: int) -> tuple[float, str]:
    """Peak of all the devices together, and where it is from.

    Args:
      name: a chip.
      devices: how many; on a CPU, cores of this host.

    Returns:
      (FLOP/s of all devices, dense BF16; FP32 on a CPU), and ``measured`` or a source.

    Raises:
      ConfigError: no such chip.
    """
    chip = lookup(name)
    if chip.bf16_flops is None:
        return measure_cpu_peak() / cpu_cores() * devices, "measured: FP32 matrix product"
    return chip.bf16_flops * devices, f"dense BF16, {chip.source}"
