"""Reading ledgers: one run, many runs, headline against all-in, and what cannot be read."""

import json
import math
import os
import socket

import psutil
import pytest
from ledgers import charge, done, header, write

from moejax.config import UserError
from moejax.cost.bill import read, run_directories, summarize
from moejax.cost.bill_text import format_ledger


def test_values_are_cumulative_the_last_whole_line_counts(tmp_path):
    torn = json.dumps(charge(9.0)).encode()[:-4]
    run = read(write(tmp_path, header(), charge(1.0), charge(2.0, tokens=30), torn))
    assert run["wall_seconds"] == 2.0
    assert run["tokens"] == 30
    assert run["status"] == "killed"
    assert run["dollars"] == pytest.approx(1.8 * 2 * 2.0 / 3600)


@pytest.mark.parametrize("rubbish", [b"", b"{", b"123", b"null", b"\0\0\0", b"\xff\xfe", b"[1]"])
def test_lines_that_are_no_charges_are_passed_over(tmp_path, rubbish):
    assert read(write(tmp_path, header(), rubbish, charge(3.0), rubbish))["wall_seconds"] == 3.0


def test_a_measured_segment_and_an_estimated_one_add_up(tmp_path):
    """36 kJ of 100 s on all of its two cores; the second process, of an older moejax, had none."""
    meter = {"source": "measured (RAPL)", "devices": 2, "includes": "packages", "reason": ""}
    measured = {
        "energy_joules": 36_000.0, "energy_seconds": 99.5, "energy_source": "measured (RAPL)",
    }  # fmt: skip
    path = write(
        tmp_path, header("a", pue=1.0, energy=meter), done(100.0, segment="a", **measured),
        header("b"), done(100.0, segment="b"),
    )  # fmt: skip
    run = read(path)
    first, second = run["segments"]
    gap = 0.5 * 2 * 5 * 0.75 * 1.8 / 3.6e6
    assert first["energy_kwh"] == pytest.approx(0.01 * 1.8 + gap)
    assert first["energy_measured_kwh"] == pytest.approx(0.01)
    assert second["energy_kwh"] == pytest.approx(100 * 2 * 5 * 0.75 * 1.8 * 1.25 / 3.6e6)
    assert run["energy_kwh"] == pytest.approx(first["energy_kwh"] + second["energy_kwh"])
    assert run["energy_measured_kwh"] is None  # not of all of it
    assert run["energy_source"] == "measured (RAPL); estimate"
    assert "(measured (RAPL); estimate, all in)" in format_ledger(summarize([path]))


def test_one_hosts_measurement_stands_for_all(tmp_path):
    meter = {"source": "measured (NVML)", "devices": 8, "includes": "boards", "reason": ""}
    measured = {
        "energy_joules": 3.6e6, "energy_seconds": 100.0, "energy_source": "measured (NVML)",
    }  # fmt: skip
    run = read(write(
        tmp_path, header(hardware="h100_sxm", devices=16, energy=meter), done(100.0, **measured)
    ))  # fmt: skip
    assert run["energy_measured_kwh"] == pytest.approx(2.0)
    assert run["energy_kwh"] == pytest.approx(2.0 * 1.82 * 1.25)
    assert run["energy_source"] == "measured (NVML), 8 of 16 devices"


def test_two_processes_may_write_to_one_ledger(tmp_path):
    run = read(write(
        tmp_path, header("a"), header("b"), charge(1, "a"), charge(10, "b"), charge(2, "a"),
        done(11, segment="b"),
    ))  # fmt: skip
    assert run["wall_seconds"] == 13
    assert [part["status"] for part in run["segments"]] == ["killed", "completed"]


def test_a_charge_after_closing_does_not_reopen(tmp_path):
    assert read(write(tmp_path, header(), done(5.0), charge(5.0)))["status"] == "completed"


def test_running_needs_the_same_host_process_and_start_time(tmp_path):
    mine = {
        "host": socket.gethostname(), "pid": os.getpid(),
        "process_start": psutil.Process().create_time(),
    }  # fmt: skip
    status = lambda **changes: read(write(tmp_path, header(**changes)))["status"]
    assert status(**mine) == "running"
    assert status(**mine | {"host": "elsewhere"}) == "killed"
    assert status(**mine | {"process_start": mine["process_start"] - 60}) == "killed"
    assert status(**mine | {"pid": 2**22 + 1}) == "killed"


def test_mfu_over_segments_of_different_machines(tmp_path):
    """1e12 FLOP in 10 s x 1e11 + 5 s x 2e11 that were possible: 50 %."""
    run = read(write(
        tmp_path, header("a"), charge(10, "a", flops=4e11), header("b", peak_flops=2e11),
        charge(5, "b", flops=6e11),
    ))  # fmt: skip
    assert run["mfu"] == pytest.approx(0.5)
    no_peak = read(write(tmp_path, header(peak_flops=None), charge(10)))
    assert no_peak["mfu"] is None and no_peak["goodput"] == 1.0


def three_runs(tmp_path):
    write(tmp_path / "final", header(run_id="final", final=True, stage="sft"), done(3600.0))
    write(tmp_path / "grid" / "failed", header(run_id="failed"),
          charge(1800.0, event="close", status="failed"))  # fmt: skip
    write(tmp_path / "grid" / "killed", header(run_id="killed"), charge(900.0))
    write(tmp_path / "final" / "checkpoints" / "old", header(run_id="copy"), done(1.0))
    return tmp_path


def test_headline_against_all_in(tmp_path):
    """2 cores x $1.8: the final run's hour costs $3.6, all 1.75 hours $6.3."""
    summary = json.loads(json.dumps(summarize([three_runs(tmp_path)]), allow_nan=False))
    assert [run["id"] for run in summary["runs"]] == ["final", "failed", "killed"]
    assert [run["status"] for run in summary["runs"]] == ["completed", "failed", "killed"]
    headline, all_in = summary["total"]["headline"], summary["total"]["all_in"]
    assert (headline["runs"], all_in["runs"]) == (1, 3)
    assert headline["dollars"] == pytest.approx(3.6)
    assert all_in["dollars"] == pytest.approx(6.3)
    assert all_in["device_hours"] == pytest.approx(3.5)
    assert (all_in["tokens"], all_in["model_flops"]) == (30, 3e10)
    assert all_in["energy_kwh"] == pytest.approx(sum(r["energy_kwh"] for r in summary["runs"]))


@pytest.mark.parametrize(
    "field",
    [
        "id",
        "status",
        "stage",
        "device",
        "devices",
        "price",
        "seconds",
        "tokens",
        "model_flops",
        "device_hours",
        "dollars",
        "energy_kwh",
        "co2_kg",
        "mfu",
        "goodput",
        "segments",
    ],
)
def test_a_run_has_the_contracts_fields(tmp_path, field):
    run = summarize([three_runs(tmp_path)])["runs"][0]
    assert run[field] is not None
    assert {"dollars_per_hour", "source", "date"} <= run["price"].keys()


def test_a_run_named_twice_counts_once(tmp_path):
    three_runs(tmp_path)
    again = [tmp_path, tmp_path / "grid", tmp_path / "grid" / "failed"]
    assert len(run_directories(again)) == 3


def test_unknown_energy_makes_the_total_unknown(tmp_path):
    write(tmp_path / "a", header(), done(1.0))
    write(tmp_path / "b", header(hardware="tpu_v6e"), done(1.0))
    summary = summarize([tmp_path])
    assert summary["total"]["all_in"]["energy_kwh"] is None
    assert "energy unknown, CO2 unknown" in format_ledger(summary)


def test_a_ledger_that_cannot_be_read_is_named_not_dropped(tmp_path):
    write(tmp_path / "good", header(), done(1.0))
    write(tmp_path / "new", header(version=2), done(1.0))
    write(tmp_path / "torn", json.dumps(header()).encode()[:50])
    summary = summarize([tmp_path])
    assert len(summary["runs"]) == 1
    assert ["newer moejax" in m or "no readable line" in m for m in summary["unreadable"]] == [
        True, True,
    ]  # fmt: skip
    assert format_ledger(summary).count("not counted:") == 2


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"segment": "s1", "event": "open", "version": 1}], "not a moejax ledger"),
        ([header(price=None), charge(1.0)], "not a moejax ledger"),
        ([header(version=2)], "written by a newer moejax"),
        ([b"hello"], "no readable line"),
        ([header(hardware="h900")], "no such chip"),
    ],
)
def test_files_that_are_no_ledgers(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path, *lines))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_directories_without_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no run \(no ledger\.jsonl\)"):
        summarize([tmp_path / "empty"])
    with pytest.raises(UserError, match="nowhere: no such directory"):
        summarize([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"holds no ledger\.jsonl"):
        read(tmp_path / "empty")


def test_what_an_owner_pays(tmp_path):
    """An hour of one H800: by hand from Epoch AI's formula, then with another price of one."""
    h800 = dict(hardware="h800_sxm", devices=1)
    run = read(write(tmp_path / "a", header(**h800, purchase={"dollars": 33_800.0}), done(3600.0)))
    hardware = 33_800 * 0.14 * math.log(10) / 8766 / (1 - 0.19)
    power = 0.7 * 1.82 * 0.75 * 1.25
    assert run["dollars_owned"] == pytest.approx(hardware + power * 0.0771)
    dear = header(**h800, purchase={"dollars": 67_600.0}, dollars_per_kwh=0.0)
    run = read(write(tmp_path / "b", dear, done(3600.0)))
    assert run["dollars_owned"] == pytest.approx(2 * hardware)
    assert read(write(tmp_path / "c", header(**h800), done(3600.0)))["dollars_owned"] > 0
    summary = summarize([tmp_path / "a", tmp_path / "b"])
    total = summary["total"]["all_in"]["dollars_owned"]
    assert total == pytest.approx(3 * hardware + power * 0.0771)
    table = format_ledger(summary).splitlines()
    assert "owned" in table[0].split() and f"${total:.2f}" in table[4].split()


def test_nobody_says_what_a_core_costs_to_buy(tmp_path):
    write(tmp_path / "a", header(), done(3600.0))
    summary = summarize([tmp_path])
    assert summary["runs"][0]["dollars_owned"] is None
    assert "owned" not in format_ledger(summary)
    write(tmp_path / "b", header(hardware="h800_sxm"), done(3600.0))
    summary = summarize([tmp_path])
    assert summary["total"]["all_in"]["dollars_owned"] is None
    assert "unknown" in format_ledger(summary)
