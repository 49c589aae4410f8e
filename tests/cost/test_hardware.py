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
        ("gpu", "NVIDIA A100-SXM4-80GB", "a100_80gb_sxm"),
        ("gpu", "NVIDIA B200", "b200"),
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
    "kind", ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090"]
)
def test_an_unknown_device_is_not_taken_for_a_similar_one(kind):
    with pytest.raises(ConfigError, match=r"cost\.hardware = 'auto': cannot tell .* set it to"):
        detect("gpu", kind)


def test_an_unknown_chip_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"cost\.hardware = 'h100_sx': .* 'h100_sxm'"):
        lookup("h100_sx")


def test_peaks_are_dense_and_for_all_devices():
    """H800: 989.4 TFLOP/s dense BF16; the sparse figure is twice that."""
    assert peak_flops("h800_sxm", 2048) == (2048 * 989.4e12, "dense BF16, maker's data sheet")
    for chip in CHIPS.values():
        assert chip.fp8_flops is None or chip.fp8_flops == pytest.approx(2 * chip.bf16_flops, 0.001)


def test_the_h800_differs_from_the_h100_in_its_links_only():
    h100, h800 = lookup("h100_sxm"), lookup("h800_sxm")
    assert h800.bf16_flops == h100.bf16_flops
    assert h800.link_bytes_per_s == 400e9 < h100.link_bytes_per_s


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
