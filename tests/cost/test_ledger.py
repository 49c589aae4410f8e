"""The open ledger: phases, totals, status, and what is left of it after SIGKILL."""

import json
import os
import threading
import time
import types

import pytest

from moejax.config import ConfigError, UserError
from moejax.cost import ledger
from moejax.cost.bill import read
from moejax.cost.counters import Unreadable
from moejax.cost.ledger import PHASES, Ledger
from moejax.cost.meter import EnergyMeter
from moejax.cost.prices import Price
from moejax.cost.segments import process_age

PRICE = Price(36.0, "user", "a test", "2025-01-01")  # a cent a device-second


def opened(path, **changes):
    options = {
        "run_id": "r", "stage": "pretrain", "hardware": "cpu", "devices": 2, "price": PRICE,
        "peak_flops": 1e11, "final": True, "backfill_seconds": 0.0,
    } | changes  # fmt: skip
    return Ledger.open(path / "ledger.jsonl", **options)


class Clock:
    """A monotonic clock that moves when told; strftime and gmtime stay real."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        fake = types.SimpleNamespace(
            monotonic=lambda: self.now, strftime=time.strftime, gmtime=time.gmtime
        )
        monkeypatch.setattr(ledger, "time", fake)

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_every_second_is_charged_to_the_innermost_phase(tmp_path, clock):
    bill = opened(tmp_path, backfill_seconds=5.0)
    clock.pass_(1)  # other
    bill.enter("startup")
    clock.pass_(2)  # startup
    with bill.phase("train"):
        clock.pass_(4)  # train
        with bill.phase("data_wait"):
            clock.pass_(8)  # data_wait
            with bill.phase("checkpoint"):
                clock.pass_(16)  # checkpoint
        clock.pass_(32)  # train
        assert bill.enter("eval") == "train"
        clock.pass_(64)  # eval
    clock.pass_(128)  # startup again, the phase before
    expected = dict.fromkeys(PHASES, 0.0) | {
        "other": 1, "startup": 5 + 2 + 128, "train": 36, "data_wait": 8, "checkpoint": 16,
        "eval": 64,
    }  # fmt: skip
    assert bill.seconds == expected
    assert bill.wall_seconds == 260
    bill.close("completed")
    clock.pass_(1000)
    with bill.phase("train"):
        clock.pass_(1000)
    bill.add(5, 5.0, 5)
    assert bill.seconds == expected and bill.tokens == 0
    assert read(tmp_path)["seconds"] == expected


def test_a_phase_ends_with_an_exception_too(tmp_path, clock):
    with pytest.raises(KeyError), opened(tmp_path) as bill:
        with pytest.raises(OSError), bill.phase("eval"):
            raise OSError
        clock.pass_(3)
        raise KeyError
    found = read(tmp_path)
    assert found["seconds"]["other"] == 3 and found["seconds"]["eval"] == 0
    assert found["status"] == "failed"


def test_the_bill_of_a_run_by_hand(tmp_path, clock):
    """5 + 10 + 5 s on 2 devices: 40 device-seconds at a cent; 5e11 FLOP in 10 s at 1e11 is 50 %."""
    bill = opened(tmp_path, backfill_seconds=5.0)
    with bill.phase("train"):
        clock.pass_(10)
        bill.add(tokens=1000, model_flops=5e11, steps=3)
    clock.pass_(5)
    assert bill.dollars == pytest.approx(0.40)
    assert bill.device_hours == pytest.approx(40 / 3600)
    assert bill.total_hours == pytest.approx(20 / 3600)
    assert bill.mfu == pytest.approx(0.5)
    bill.close("completed")
    found = read(tmp_path)
    assert found["dollars"] == pytest.approx(0.40)
    assert found["device_hours"] == pytest.approx(40 / 3600)
    assert (found["tokens"], found["model_flops"], found["steps"]) == (1000, 5e11, 3)
    assert found["mfu"] == pytest.approx(0.5)
    assert found["goodput"] == pytest.approx(0.5)
    # 5 W x 1.8 x 0.75 x 1.25 for 40 device-seconds
    assert found["energy_kwh"] == pytest.approx(0.005 * 1.8 * 0.75 * 1.25 * 40 / 3600)
    assert found["co2_kg"] == pytest.approx(found["energy_kwh"] * 0.475)


class Counter:
    """Ten joules at each reading, until it breaks."""

    broken = False

    def delta(self):
        if self.broken:
            raise Unreadable("GPU is lost")
        return 10.0


def lines(path):
    return [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]


def test_measured_energy_goes_into_every_charge(tmp_path, clock):
    """20 J of two devices in 10 s, x 1.8 for the server x a PUE of 1.5, on France's grid."""
    closed = []
    meter = EnergyMeter(
        "measured (NVML)", [Counter()], devices=2, includes="boards", clock=lambda: clock.now,
        close=lambda: closed.append(True),
    )  # fmt: skip
    bill = opened(tmp_path, meter=meter, pue=1.5, region="france")  # reads once: 10 J
    clock.pass_(10)
    bill.close("completed")  # and again
    assert closed == [True]
    header, first, last = lines(tmp_path)
    assert header["pue"] == 1.5
    assert header["energy"] == {
        "source": "measured (NVML)", "devices": 2, "includes": "boards", "reason": "",
    }  # fmt: skip
    assert (first["energy_joules"], last["energy_joules"]) == (10.0, 20.0)
    assert (last["energy_seconds"], last["energy_source"]) == (10.0, "measured (NVML)")
    assert "energy_reason" not in last
    found = read(tmp_path)
    assert found["energy_measured_kwh"] == pytest.approx(20 / 3.6e6)
    assert found["energy_kwh"] == pytest.approx(20 / 3.6e6 * 1.8 * 1.5)
    assert found["co2_kg"] == pytest.approx(found["energy_kwh"] * 0.056)
    assert found["energy_source"] == "measured (NVML)"
    assert found["energy_includes"] == "boards; x 1.8 for the server x 1.5 (PUE)"
    assert found["energy_reason"] is None


def test_what_the_meter_missed_is_estimated(tmp_path, clock):
    """5 s of start-up before it and 5 s after it broke, of 20 s; 2 cores of 5 W and their share."""
    counter = Counter()
    meter = EnergyMeter("measured (RAPL)", [counter], devices=2, clock=lambda: clock.now)
    bill = opened(tmp_path, meter=meter, backfill_seconds=5.0)
    clock.pass_(10)
    bill._flush("charge")
    counter.broken = True
    clock.pass_(5)
    bill.close("completed")
    assert lines(tmp_path)[-1]["energy_reason"] == "GPU is lost"
    found = read(tmp_path)
    around = 1.8 * 1.25
    estimate = 10 * 2 * 5 * 0.75 * around / 3.6e6
    assert found["energy_measured_kwh"] == pytest.approx(20 / 3.6e6)
    assert found["energy_kwh"] == pytest.approx(20 / 3.6e6 * around + estimate)
    assert found["energy_source"] == "measured (RAPL) 50.0 % of the time, else estimate"
    assert found["energy_reason"] == "GPU is lost"


def test_a_meter_that_cannot_measure_leaves_its_reason(tmp_path, clock):
    bill = opened(tmp_path, meter=EnergyMeter("estimate", reason="no counters"))
    clock.pass_(10)
    bill.close("completed")
    assert "energy_joules" not in lines(tmp_path)[-1]
    found = read(tmp_path)
    assert (found["energy_source"], found["energy_reason"]) == ("estimate", "no counters")
    assert found["energy_measured_kwh"] is None
    assert found["energy_kwh"] == pytest.approx(10 * 2 * 5 * 0.75 * 1.8 * 1.25 / 3.6e6)


def test_a_slow_meter_does_not_hold_up_the_training_loop(tmp_path):
    reading, release = threading.Event(), threading.Event()

    class Slow:
        def delta(self):
            reading.set()
            release.wait(20)
            return 0.0

    meter = EnergyMeter("measured (NVML)", [], devices=1)
    bill = opened(tmp_path, meter=meter)
    meter._counters = [Slow()]
    assert reading.wait(20)  # the flushing thread waits for the counter
    start = time.monotonic()
    bill.add(1, 1.0, 1)
    bill.enter("train")
    took = time.monotonic() - start
    release.set()
    bill.close("completed")
    assert took < 1.0


def test_resuming_adds_a_segment_at_its_own_rate(tmp_path, clock):
    first = opened(tmp_path)
    with first.phase("train"):
        clock.pass_(10)
        first.add(100, 1e9, 1)
    first.close("interrupted")
    assert read(tmp_path)["status"] == "interrupted"
    dearer = Price(72.0, "user", "a test", "2025-01-02")
    second = opened(tmp_path, price=dearer, devices=1)
    with second.phase("train"):
        clock.pass_(5)
        second.add(50, 2e9, 1)
    assert second.seconds["train"] == 5 and second.dollars == pytest.approx(0.10)
    assert second.total_dollars == pytest.approx(0.20 + 0.10)
    assert second.total_hours == pytest.approx(15 / 3600)
    assert second.total_device_hours == pytest.approx((20 + 5) / 3600)
    assert (second.total_tokens, second.total_flops) == (150, 3e9)
    second.close("budget")
    found = read(tmp_path)
    assert found["status"] == "budget"
    assert found["dollars"] == pytest.approx(0.30)
    assert found["seconds"]["train"] == 15
    assert [part["status"] for part in found["segments"]] == ["interrupted", "budget"]
    assert found["price"]["dollars_per_hour"] == 72.0


@pytest.mark.parametrize(
    "error, status",
    [(None, "completed"), (KeyboardInterrupt, "interrupted"), (ValueError, "failed")],
)
def test_leaving_the_context_closes_it(tmp_path, error, status):
    try:
        with opened(tmp_path):
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert read(tmp_path)["status"] == status


def test_the_first_status_stands(tmp_path):
    with opened(tmp_path) as bill:
        bill.close("budget")
        size = os.path.getsize(tmp_path / "ledger.jsonl")
        bill.close("failed")
    assert read(tmp_path)["status"] == "budget"
    assert os.path.getsize(tmp_path / "ledger.jsonl") == size


def test_unknown_names(tmp_path):
    with opened(tmp_path / "run") as bill:
        with pytest.raises(ValueError, match="no phase 'training'"):
            bill.enter("training")
        with pytest.raises(ValueError, match="no status 'done'"):
            bill.close("done")
    with pytest.raises(ConfigError, match=r"cost\.hardware"):
        opened(tmp_path / "other", hardware="gpu")
    with pytest.raises(ConfigError, match=r"cost\.region"):
        opened(tmp_path / "other", region="mars")
    with pytest.raises(ConfigError, match=r"cost\.pue"):
        opened(tmp_path / "other", pue=0.5)
    assert not (tmp_path / "other").exists()


def test_it_is_flushed_every_second_and_sums_to_the_wall_time(tmp_path):
    start = time.monotonic()
    bill = opened(tmp_path)
    with bill.phase("train"):
        deadline = start + 10
        while len((tmp_path / "ledger.jsonl").read_text().splitlines()) < 3:
            assert time.monotonic() < deadline, "no flush by itself"
            time.sleep(0.02)
    assert ledger.FLUSH_SECONDS < 1
    assert time.monotonic() - start < 3  # 0.8 s on an idle machine
    assert read(tmp_path)["status"] == "running"
    bill.close("completed")
    wall = time.monotonic() - start
    assert sum(read(tmp_path)["seconds"].values()) == pytest.approx(wall, rel=0.01, abs=0.02)


def test_the_segments_of_a_run_sum_to_the_time_that_they_took(tmp_path):
    wall = inside = 0.0
    for _ in range(2):
        start = time.monotonic()
        bill = opened(tmp_path)
        begun = time.monotonic()
        for phase in ("compile", "train", "eval"):
            with bill.phase(phase):
                time.sleep(0.1)
        inside += time.monotonic() - begun
        bill.close("interrupted")
        wall += time.monotonic() - start
    found = read(tmp_path)
    # A busy machine may take its time to open and to close the file.
    assert inside - 0.001 <= sum(found["seconds"].values()) <= wall + 0.001
    assert found["wall_seconds"] == sum(found["seconds"].values())


def test_threads_lose_nothing(tmp_path):
    bill = opened(tmp_path)
    start = time.monotonic()

    def work():
        for _ in range(2000):
            with bill.phase("train"):
                bill.add(1, 1.0, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - start
    assert (bill.tokens, bill.flops) == (8000, 8000.0)
    assert bill.wall_seconds == pytest.approx(wall, rel=0.02, abs=0.02)
    bill.close("completed")


def test_charging_is_cheap(tmp_path):
    """What the loop does in a step takes under 0.5 % of one of 50 ms; the quickstart's take 700.

    experiments/launch/ledger_overhead.py measures it in a run; generous, for busy machines.
    """
    with opened(tmp_path) as bill:
        start = time.process_time()
        for _ in range(2000):
            spent = (bill.total_dollars, bill.total_flops, bill.total_hours)
            with bill.phase("data_wait"):
                pass
            with bill.phase("train"):
                bill.add(1, 1.0, 1)
        assert (time.process_time() - start) / 2000 < 0.005 * 0.050
        assert all(value >= 0 for value in spent)


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path, clock):
    bill = opened(tmp_path)
    clock.pass_(7)
    bill.close("interrupted")
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:-10])
    assert read(tmp_path)["wall_seconds"] == 7
    again = opened(tmp_path)
    assert again.total_hours == pytest.approx(7 / 3600)
    clock.pass_(1)
    again.close("completed")
    found = read(tmp_path)
    assert len(found["segments"]) == 2
    assert (found["wall_seconds"], found["status"]) == (8, "completed")


def test_a_short_write_is_an_error_and_the_next_line_is_whole(tmp_path, clock, monkeypatch):
    bill = opened(tmp_path)
    clock.pass_(3)
    real = os.write
    monkeypatch.setattr(ledger.os, "write", lambda file, data: real(file, data[:20]))
    with pytest.raises(OSError, match="wrote 20 of"):
        bill._flush("charge")
    monkeypatch.setattr(ledger.os, "write", real)
    bill.close("completed")
    assert read(tmp_path)["wall_seconds"] == 3


def test_a_ledger_that_cannot_be_read_is_not_added_to(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps({"segment": "a", "event": "open", "version": 99}) + "\n")
    with pytest.raises(UserError, match="newer moejax"):
        opened(tmp_path)
    path.write_text(json.dumps({"segment": "a", "event": "open", "version": 1}) + "\n")
    with pytest.raises(UserError, match="not a moejax ledger"):
        opened(tmp_path)


def test_a_later_ledger_of_a_process_is_not_charged_its_start_up_again(tmp_path):
    opened(tmp_path / "a", backfill_seconds=None).close("completed")
    opened(tmp_path / "b", backfill_seconds=None).close("completed")
    assert read(tmp_path / "b")["seconds"]["startup"] == 0.0


def test_the_age_of_this_process():
    age = process_age()
    time.sleep(0.05)
    assert process_age() - age == pytest.approx(0.05, abs=0.2)
    assert 0 < age < 24 * 3600
