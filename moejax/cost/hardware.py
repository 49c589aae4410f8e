"""Chips as a table: dense peaks, memory, links, power; and which of them this machine has.

Peaks are dense ones: several public tables list the sparse figures, twice as high, for the H100.
Links are rated in one direction: data sheets add both up, but a device waits for one. On a CPU the
device that is billed is one core (a cloud's vCPU), and its peak is measured.
"""

import dataclasses
import math
import os
import pathlib
import time

from moejax.config import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins devices.

    Attributes:
      name: ``NVLink 4``, ``ICI``, ``400 Gb/s InfiniBand`` …
      bytes_per_s: what one device can send, and receive at the same time, bytes/s at its rating.
        About 0.8 of it is reached: DeepSeek-V3's authors count on 160 of the H800's 200 GB/s and
        40 of a NIC's 50 (arXiv 2505.09343).
      devices: how many it joins without a slower link between; None for a whole cluster.
    """

    name: str
    bytes_per_s: float
    devices: int | None = None


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device; None where its maker publishes no figure.

    Attributes:
      name: as in ``cost.hardware``.
      bf16_flops: dense BF16 peak of one device, FLOP/s; None where it is measured (CPU). FP16 is
        the same on every GPU here; TPUs have none.
      fp8_flops: dense FP8 peak, accumulating in FP32; None without FP8 arithmetic.
      tf32_flops: dense TF32 peak.
      fp32_flops: FP32 peak outside the tensor cores; with them on AMD, which has an FP32 product.
      memory_bytes: memory of one device; None where it is not the device's own (CPU).
      bandwidth: of that memory, bytes/s.
      tdp_watts: thermal design power of one device.
      scale_up: the fast link inside a server, rack or pod.
      scale_out: the network beyond it: a typical deployment's, not the chip's own.
      server_multiplier: power of a server over that of its chips.
      power_fraction: average power drawn over that at full load.
      pue: power usage effectiveness of the data centre: 1.1 hyperscaler, else 1.25.
      source: where the figures are from.
      date: of the source, YYYY or finer.
    """

    name: str
    bf16_flops: float | None
    fp8_flops: float | None
    tf32_flops: float | None
    fp32_flops: float | None
    memory_bytes: float | None
    bandwidth: float | None
    tdp_watts: float | None
    scale_up: Link | None
    scale_out: Link | None
    source: str
    date: str
    server_multiplier: float = 1.8
    power_fraction: float = 0.75
    pue: float = 1.25

    @property
    def link_bytes_per_s(self) -> float | None:
        """The scale-up link as data sheets give it, both directions together, bytes/s."""
        return None if self.scale_up is None else 2 * self.scale_up.bytes_per_s


def _gpu(
    name: str, tflops: tuple[float, float | None, float | None, float], gb: float, tb_per_s: float,
    watts: float, scale_up: Link, scale_out: Link | None, source: str, date: str,
    server_multiplier: float = 1.8,
) -> Chip:  # fmt: skip
    """A GPU in the units of data sheets; ``tflops`` are dense BF16, FP8, TF32 and FP32."""
    peaks = [peak and peak * 1e12 for peak in tflops]
    return Chip(
        name, *peaks, gb * 1e9, tb_per_s * 1e12, watts, scale_up, scale_out, source, date,
        server_multiplier,
    )  # fmt: skip


def _tpu(
    name: str, tflops: float, gb: float, tb_per_s: float, watts: float | None, ici_gb: float,
    pod: int, dcn_gbit: float | None, date: str, fp8_tflops: float | None = None,
) -> Chip:  # fmt: skip
    """A TPU in the units of Google's documentation, which does not give newer ones' power.

    Args:
      ici_gb: of all of a chip's links together, one direction, GB/s.
      pod: chips of a pod.
      dcn_gbit: a chip's share of its host's network, Gb/s.
    """
    network = None if dcn_gbit is None else _network(dcn_gbit, "data centre network")
    return Chip(
        name, tflops * 1e12, fp8_tflops and fp8_tflops * 1e12, None, None, gb * 1e9,
        tb_per_s * 1e12, watts, Link("ICI", ici_gb * 1e9, pod), network,
        "cloud.google.com/tpu/docs", date, server_multiplier=1.56, power_fraction=0.43, pue=1.1,
    )  # fmt: skip


def _nvlink(generation: int, gb_both_ways: float, devices: int = 8) -> Link:
    """NVLink in the way of data sheets."""
    return Link(f"NVLink {generation}", gb_both_ways / 2 * 1e9, devices)


def _network(gbit: float, name: str = "InfiniBand or RoCE") -> Link:
    """One network card for each device."""
    return Link(f"{gbit:g} Gb/s {name}", gbit / 8 * 1e9)


_HOPPER = (989.4, 1979.0, 494.7, 66.9)
_NIC_200, _NIC_400 = _network(200), _network(400)
_BLACKWELL = "NVIDIA Blackwell technical brief"

# Server multipliers and power fractions: Epoch AI, training-cost-trends.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        #    name  (BF16, FP8, TF32, FP32), GB, TB/s, W, links, source
        _gpu("a100_40gb_sxm", (312, None, 156, 19.5), 40, 1.555, 400, _nvlink(3, 600), _NIC_200,
             "NVIDIA A100 data sheet", "2022", server_multiplier=2.03),
        _gpu("a100_80gb_sxm", (312, None, 156, 19.5), 80, 2.04, 400, _nvlink(3, 600), _NIC_200,
             "NVIDIA A100 data sheet", "2022", server_multiplier=2.03),
        # The bridge joins two cards; servers of PCIe cards differ too much to name a network.
        _gpu("a100_80gb_pcie", (312, None, 156, 19.5), 80, 1.935, 300, _nvlink(3, 600, 2), None,
             "NVIDIA A100 data sheet", "2022", server_multiplier=2.03),
        _gpu("h100_sxm", _HOPPER, 80, 3.35, 700, _nvlink(4, 900), _NIC_400,
             "NVIDIA H100 data sheet", "2023", server_multiplier=1.82),
        _gpu("h100_pcie", (756, 1513, 378, 51.2), 80, 2.0, 350, _nvlink(4, 600, 2), None,
             "NVIDIA H100 data sheet", "2023", server_multiplier=1.82),
        _gpu("h100_nvl", (835.5, 1671, 418, 60), 94, 3.9, 400, _nvlink(4, 600, 2), None,
             "NVIDIA H100 data sheet", "2024", server_multiplier=1.82),
        # The export-restricted H100: same arithmetic, slower links. Network: DeepSeek-V3's cluster.
        _gpu("h800_sxm", _HOPPER, 80, 3.36, 700, _nvlink(4, 400), _NIC_400,
             "NVIDIA H800 data sheet", "2023", server_multiplier=1.82),
        # The one after that: fast links, little arithmetic. Network: assumed as an H100 server's.
        _gpu("h20", (148, 296, 74, 44), 96, 4.0, 400, _nvlink(4, 900), _NIC_400,
             "Epoch AI's chip table", "2025"),
        _gpu("h200_sxm", _HOPPER, 141, 4.8, 700, _nvlink(4, 900), _NIC_400,
             "NVIDIA H200 data sheet", "2024"),
        _gpu("b200", (2250, 4500, 1100, 80), 192, 8.0, 1000, _nvlink(5, 1800), _NIC_400,
             _BLACKWELL, "2024"),
        # One of a superchip's two GPUs, in a rack of 72.
        _gpu("gb200", (2500, 5000, 1250, 90), 186, 8.0, 1200, _nvlink(5, 1800, 72), _NIC_400,
             _BLACKWELL, "2024"),
        # Seven links of 64 GB/s each way, one to every other GPU: a single pair has one of them.
        _gpu("mi300x", (1307.4, 2614.9, 653.7, 163.4), 192, 5.3, 750,
             Link("Infinity Fabric", 448e9, 8), _NIC_400, "AMD MI300X data sheet", "2023"),
        # Its tensor cores run at half rate when they accumulate in FP32, which is counted here.
        _gpu("rtx_4090", (165.2, 330.3, 82.6, 82.6), 24, 1.008, 450,
             Link("PCIe 4.0 x16", 31.5e9, 8), None, "NVIDIA Ada white paper", "2022"),
        #    name     BF16 GB TB/s  W    ICI pod  DCN
        # v4: average power; six links of 50 GB/s (Jouppi et al., arXiv 2304.01433).
        _tpu("tpu_v4", 275, 32, 1.2, 170, 300, 4096, None, "2024"),
        # v5e's power: Epoch AI's chip table.
        _tpu("tpu_v5e", 197, 16, 0.82, 140, 200, 256, 25, "2025"),
        _tpu("tpu_v5p", 459, 95, 2.77, None, 600, 8960, 50, "2025", fp8_tflops=459),
        _tpu("tpu_v6e", 918, 32, 1.64, None, 400, 256, 100, "2025"),
        Chip(
            "cpu", None, None, None, None, None, None, 5.0, None, None,
            "estimate: about 300 W for the 64 threads of a cloud server's Xeon; "
            "peak measured here", "2026",
        ),
    )
}  # fmt: skip

# jax's device kinds, lower case. Exact names only: an "H800 PCIe", an "H200 NVL", an H20 of 141 GB
# ("H20-3e") or a MIG slice has other peaks, memory or links than the chip its name begins with.
DEVICE_KINDS = {
    "nvidia a100-sxm4-40gb": "a100_40gb_sxm",
    "nvidia a100-sxm4-80gb": "a100_80gb_sxm",
    "nvidia a100 80gb pcie": "a100_80gb_pcie",
    "nvidia h100 80gb hbm3": "h100_sxm",
    "nvidia h100 pcie": "h100_pcie",
    "nvidia h100 nvl": "h100_nvl",
    "nvidia h800": "h800_sxm",
    "nvidia h20": "h20",
    "nvidia h200": "h200_sxm",
    "nvidia b200": "b200",
    "nvidia gb200": "gb200",
    "nvidia geforce rtx 4090": "rtx_4090",
    "amd instinct mi300x": "mi300x",
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
    return chip.bf16_flops * devices, f"dense BF16, {chip.source}, {chip.date}"
