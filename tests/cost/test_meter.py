"""Measured energy: a fake NVML, a fake powercap tree, and everything that may go wrong."""

import sys
import types

import pytest

from moejax.cost import counters
from moejax.cost.counters import NvmlCounter, RaplCounter, Unreadable
from moejax.cost.meter import NVML, RAPL, EnergyMeter, open_meter

GPU = "NVIDIA H100 80GB HBM3"


class FakeNvml:
    """GPUs whose counters go up by a kilojoule each time they are read."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, names=(GPU,), mig=(), total=True, watts=()):
        self.names, self.mig, self.total = list(names), mig, total
        self.millijoules = [5_000_000 * (i + 1) for i in range(len(names))]
        self.watts = list(watts)
        self.asked, self.shut = [], 0
        self.error = None

    def _fail(self):
        if self.error:
            raise self.error

    def nvmlDeviceGetCount(self):
        self._fail()
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if not uuid.startswith("GPU-"):
            raise self.NVMLError("Invalid Argument")
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetName(self, index):
        return self.names[index]

    def nvmlDeviceGetMigMode(self, index):
        if "H100" not in self.names[index]:
            raise self.NVMLError_NotSupported("Not Supported")
        return [int(index in self.mig), 0]

    def nvmlDeviceGetTotalEnergyConsumption(self, index):
        self._fail()
        if not self.total:
            raise self.NVMLError_NotSupported("Not Supported")
        self.asked.append(index)
        self.millijoules[index] += 1_000_000
        return self.millijoules[index]

    def nvmlDeviceGetPowerUsage(self, index):
        self._fail()
        return self.watts.pop(0) * 1000

    def nvmlShutdown(self):
        self.shut += 1


def device(platform="gpu", ordinal=0):
    return types.SimpleNamespace(platform=platform, local_hardware_id=ordinal)


def opened(nvml, *ordinals, hardware="h100_sxm"):
    devices = [device(ordinal=i) for i in ordinals or (0,)]
    return open_meter(hardware, devices, len(devices), nvml=lambda: nvml)


@pytest.fixture(autouse=True)
def no_cuda_variables(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


def test_the_counters_of_two_gpus_are_summed():
    nvml = FakeNvml((GPU, GPU))
    meter = opened(nvml, 0, 1)
    assert (meter.source, meter.devices, meter.reason) == (NVML, 2, "")
    assert "boards" in meter.includes
    assert meter.read()[0] == 2000.0  # a kilojoule each since the meter was opened
    joules, seconds = meter.read()
    assert joules == 4000.0 and 0 <= seconds < 60
    meter.close()
    meter.close()
    assert nvml.shut == 1
    assert meter.read()[0] == 4000.0


def test_a_counter_that_starts_again_counts_from_zero():
    nvml = FakeNvml()
    meter = opened(nvml)
    nvml.millijoules[0] = 0  # the driver was loaded again; 1 kJ since
    assert meter.read()[0] == 1000.0
    assert meter.read()[0] == 2000.0


def test_power_samples_where_there_is_no_energy_counter():
    """100 W at 0 s, 300 W at 2 s, 300 W at 3 s: 400 J, then 300 J more."""
    times = iter([0.0, 2.0, 3.0])
    counter = NvmlCounter(FakeNvml(total=False, watts=[100, 300, 300]), 0, lambda: next(times))
    assert counter.delta() == pytest.approx(400.0)
    assert counter.delta() == pytest.approx(300.0)


@pytest.mark.parametrize(
    "visible, ordinals, asked",
    [
        (None, (0, 2), [0, 2]),
        ("2,0", (0, 1), [2, 0]),
        ("1", (0,), [1]),
        ("GPU-2, GPU-1", (1,), [1]),
    ],
)
def test_cudas_ordinals_are_not_nvmls_indices(monkeypatch, visible, ordinals, asked):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml((GPU, GPU, GPU))
    assert opened(nvml, *ordinals).source == NVML
    assert nvml.asked == asked


@pytest.mark.parametrize(
    "visible, names, reason",
    [
        ("MIG-1234", (GPU,), "MIG slice"),
        ("7", (GPU,), "'7', which is none of the GPUs"),
        ("-1", (GPU,), "'-1', which is none"),
        ("", (GPU,), "'', which is none"),
        ("GPU-x", (GPU,), "NVML: invalid uuid"),
        (None, (GPU, "NVIDIA T4"), "GPUs of several kinds"),
    ],
)
def test_a_gpu_that_cannot_be_told_is_not_measured(monkeypatch, visible, names, reason):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml(names)

    def by_uuid(uuid):
        raise nvml.NVMLError("invalid uuid")

    nvml.nvmlDeviceGetHandleByUUID = by_uuid
    meter = opened(nvml)
    assert (meter.source, meter.devices) == ("estimate", 0)
    assert reason in meter.reason
    assert meter.read() == (0.0, 0.0)
    assert nvml.shut == 1


def test_gpus_of_several_kinds_in_the_order_of_the_bus(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert opened(FakeNvml((GPU, "NVIDIA T4")), 1).source == NVML


def test_more_devices_than_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "names 1 GPUs" in opened(FakeNvml((GPU, GPU)), 0, 1).reason


def test_a_gpu_cut_into_slices_is_not_measured():
    assert "MIG" in opened(FakeNvml(mig=(0,))).reason


def test_nvml_errors_are_reasons():
    nvml = FakeNvml()
    nvml.error = nvml.NVMLError("Insufficient Permissions")
    assert opened(nvml).reason == "NVML: Insufficient Permissions"


def test_a_counter_that_fails_midway_keeps_what_it_had():
    nvml = FakeNvml()
    meter = opened(nvml)
    joules, seconds = meter.read()
    nvml.error = nvml.NVMLError("GPU is lost")
    assert meter.read() == (joules, seconds) == (1000.0, seconds)
    assert meter.reason == "NVML: GPU is lost"
    nvml.error = None
    assert meter.read() == (joules, seconds)  # a gap is not papered over
    assert meter.source == NVML


def test_without_the_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = open_meter("h100_sxm", [device()], 1)
    assert meter.source == "estimate" and "pip install 'moejax[energy]'" in meter.reason


def test_without_a_driver(monkeypatch):
    nvml = FakeNvml()

    def init():
        raise nvml.NVMLError("NVML Shared Library Not Found")

    nvml.nvmlInit = init
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert open_meter("h100_sxm", [device()], 1).reason == "NVML: NVML Shared Library Not Found"


def zone(powercap, folder, name, microjoules, limit=262_143_328_850):
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    return path


def cpu(powercap, cores=2):
    return open_meter("cpu", [device("cpu")], cores, powercap=powercap)


def set_energy(path, microjoules):
    (path / "energy_uj").write_text(f"{microjoules}\n")


def test_cpu_packages_and_their_memory_are_summed_and_shared(tmp_path, monkeypatch):
    """Two packages and one memory zone: 8 + 4 + 2 J, of which 2 of 8 cores have a quarter.

    A package holds its cores and graphics, and ``psys`` holds the packages: not counted twice.
    """
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 0)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 0)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    meter = cpu(tmp_path)
    assert (meter.source, meter.devices) == (RAPL, 2)
    assert "2 of 8 cores" in meter.includes
    set_energy(first, 9_000_000)
    set_energy(second, 4_000_000)
    set_energy(memory, 2_000_000)
    set_energy(whole, 900_000_000)
    assert meter.read()[0] == pytest.approx((8 + 4 + 2) / 4)


def test_a_counter_that_wraps(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, limit=10_000_000)
    counter = RaplCounter(path)
    set_energy(path, 2_000_000)
    assert counter.delta() == pytest.approx(3.0)
    set_energy(path, 2_500_000)
    assert counter.delta() == pytest.approx(0.5)


def test_no_permission(tmp_path, monkeypatch):
    """Root reads anything, so the refusal is made here."""
    path = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    real = type(path).read_text

    def read_text(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(path), "read_text", read_text)
    meter = cpu(tmp_path)
    assert meter.source == "estimate"
    assert meter.reason.startswith("permission denied:") and "energy_uj" in meter.reason


def test_a_machine_without_counters(tmp_path):
    assert "no CPU energy counters" in cpu(tmp_path).reason
    assert "no CPU energy counters" in cpu(tmp_path / "missing").reason
    zone(tmp_path, "intel-rapl:0", "package-0", "many")
    assert "invalid literal" in cpu(tmp_path).reason


def test_only_what_is_billed_is_measured(tmp_path):
    """A CPU that stands in for an H100 says nothing of the H100's energy."""
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = open_meter("h100_sxm", [device("cpu")], 1, powercap=tmp_path)
    assert meter.reason == "billed as h100_sxm, but run on a cpu"
    assert "no counter of a tpu" in open_meter("tpu_v4", [device("tpu")], 1).reason


def test_a_meter_describes_itself():
    assert EnergyMeter("estimate", reason="why").describe() == {
        "source": "estimate", "devices": 0, "includes": "", "reason": "why",
    }  # fmt: skip


def test_seconds_are_those_of_the_last_good_reading():
    class Flaky:
        good = True

        def delta(self):
            if not self.good:
                raise Unreadable("gone")
            return 10.0

    now, flaky = [100.0], Flaky()
    meter = EnergyMeter(NVML, [flaky], devices=1, share=0.5, clock=lambda: now[0])
    now[0] = 104.0
    assert meter.read() == (5.0, 4.0)
    now[0], flaky.good = 109.0, False
    assert meter.read() == (5.0, 4.0)


def test_this_machine_has_a_meter_or_a_reason():
    meter = open_meter("cpu", [device("cpu")], 1)
    assert meter.source in (RAPL, "estimate") and (meter.devices or meter.reason)
    assert counters.POWERCAP.name == "powercap"
    meter.close()
