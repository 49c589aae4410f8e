"""The chip table, detection from jax's names, and the measured peak of a CPU."""

import time

import pytest

from moejax.config import ConfigError
from moejax.cost import hardware
from moejax.cost.hardware import CHIPS, detect, lookup, peak_flops


@pytest.mark.parametrize(
    "platform, kind, name",
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("gpu", "NVIDIA H200", "h200_sxm"),
        ("gpu", "NVIDIA H800", "h800_sxm"),
        ("gpu", "NVIDIA H20", "h20"),
        ("gpu", "NVIDIA H100 PCIe", "h100_pcie"),
        ("gpu", "NVIDIA H100 NVL", "h100_nvl"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "a100_40gb_sxm"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "a100_80gb_sxm"),
        ("gpu", "NVIDIA A100 80GB PCIe", "a100_80gb_pcie"),
        ("gpu", "NVIDIA B200", "b200"),
        ("gpu", "NVIDIA GB200", "gb200"),
        ("gpu", "NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("gpu", "AMD Instinct MI300X", "mi300x"),
        ("tpu", "TPU v4", "tpu_v4"),
        ("tpu", "TPU v5 lite", "tpu_v5e"),
        ("tpu", "TPU v5p", "tpu_v5p"),
        ("tpu", "TPU v6 lite", "tpu_v6e"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_detection(platform, kind, name):
    assert detect(platform, kind) == name


@pytest.mark.parametrize(
    "kind",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA H800 PCIe",
        "NVIDIA H200 NVL",
        "NVIDIA H20-3e",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD Instinct MI308X",
        "TPU7x",
        "",
    ],
)
def test_an_unknown_device_is_not_taken_for_a_similar_one(kind):
    with pytest.raises(ConfigError, match=r"cost\.hardware = 'auto': cannot tell .* set it to"):
        detect("gpu", kind)


def test_an_unknown_chip_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"cost\.hardware = 'h100_sx': .* 'h100_sxm'"):
        lookup("h100_sx")


def test_peaks_are_dense_and_for_all_devices():
    """H800: 989.4 TFLOP/s dense BF16; the sparse figure is twice that."""
    flops, source = peak_flops("h800_sxm", 2048)
    assert flops == 2048 * 989.4e12
    assert source == "dense BF16, NVIDIA H800 data sheet, 2023"


# Dense BF16 peaks, TFLOP/s, from a second source: Epoch AI's chip table (training-cost-trends,
# data/Chip dataset, as of June 2025), which gives what makers call "without sparsity".
EPOCH_BF16 = {
    "a100_40gb_sxm": 312, "a100_80gb_sxm": 312, "a100_80gb_pcie": 312, "h100_sxm": 989.4,
    "h100_pcie": 756, "h100_nvl": 835.5, "h800_sxm": 989, "h20": 148, "h200_sxm": 989.5,
    "b200": 2250, "gb200": 2500, "mi300x": 1307.4, "tpu_v4": 275, "tpu_v5e": 197, "tpu_v5p": 459,
    "tpu_v6e": 918,
}  # fmt: skip


@pytest.mark.parametrize("name", EPOCH_BF16)
def test_bf16_peaks_against_another_table(name):
    assert lookup(name).bf16_flops == pytest.approx(EPOCH_BF16[name] * 1e12, rel=1e-3)


def test_the_peaks_of_a_chip_belong_together():
    """Each halving of the precision doubles the peak, but on two chips that say otherwise.

    v5p computes FP8 at the rate of BF16 (Google's documentation), and the Hoppers' tensor cores do
    all three; a slip from a sparse column would break a ratio.
    """
    for chip in CHIPS.values():
        if chip.fp8_flops is not None:
            ratio = 1 if chip.name == "tpu_v5p" else 2
            assert chip.fp8_flops == pytest.approx(ratio * chip.bf16_flops, rel=0.002)
        if chip.tf32_flops is not None:
            assert chip.tf32_flops == pytest.approx(chip.bf16_flops / 2, rel=0.03)
            assert chip.fp32_flops <= chip.tf32_flops


def test_every_chip_says_where_and_when():
    for chip in CHIPS.values():
        assert chip.source and 2020 <= int(chip.date[:4]) <= 2030
        assert chip.pue >= 1 and chip.server_multiplier >= 1 and 0 < chip.power_fraction <= 1


def test_the_h800_differs_from_the_h100_in_its_links_only():
    h100, h800 = lookup("h100_sxm"), lookup("h800_sxm")
    assert (h800.bf16_flops, h800.fp8_flops) == (h100.bf16_flops, h100.fp8_flops)
    assert h800.link_bytes_per_s == 400e9
    assert h800.scale_up.bytes_per_s == 200e9  # one direction (arXiv 2505.09343)
    assert h100.scale_up.bytes_per_s == 450e9
    assert h800.scale_out == h100.scale_out
    assert h800.scale_out.bytes_per_s == 50e9  # one 400 Gb/s NIC a GPU (same paper)


def test_the_h20_is_the_other_way_round():
    """Slow arithmetic, fast links: 148 TFLOP/s, 96 GB at 4 TB/s, NVLink of 900 GB/s."""
    h20, h800 = lookup("h20"), lookup("h800_sxm")
    assert h20.bf16_flops < 0.16 * h800.bf16_flops
    assert h20.link_bytes_per_s == 900e9 and h20.bandwidth == 4e12
    assert h20.memory_bytes == 96e9 and h20.tdp_watts == 400


def test_links_are_rated_in_one_direction():
    """v5p: 4,800 Gb/s a chip, which Google now gives as 1,200 GB/s both ways."""
    assert lookup("tpu_v5p").scale_up.bytes_per_s == 4800e9 / 8
    assert lookup("tpu_v5p").link_bytes_per_s == 1200e9
    assert lookup("gb200").scale_up.devices == 72
    assert lookup("cpu").link_bytes_per_s is None
    for chip in CHIPS.values():
        if chip.scale_out is not None:
            assert chip.scale_out.bytes_per_s < chip.scale_up.bytes_per_s


def test_a_cpu_is_measured_and_billed_by_the_core(monkeypatch):
    monkeypatch.setattr(hardware, "measure_cpu_peak", lambda: 1e11)
    monkeypatch.setattr(hardware, "cpu_cores", lambda: 4)
    flops, source = peak_flops("cpu", 2)
    assert flops == 0.5e11
    assert source.startswith("measured")


def test_measuring_takes_no_longer_than_it_says():
    hardware.measure_cpu_peak(seconds=0.0)
    start = time.perf_counter()
    assert 1e8 < hardware.measure_cpu_peak(seconds=0.05) < 1e14
    assert time.perf_counter() - start < 5.0  # generous: a busy machine
    assert hardware.cpu_cores() >= 1


def test_a_containers_quota_bounds_the_cores(tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")  # half a core
    assert hardware.cpu_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert hardware.cpu_cores(quota) == hardware.cpu_cores(tmp_path / "missing") >= 1
