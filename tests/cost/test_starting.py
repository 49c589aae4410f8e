"""Starts that never came to a ledger of their own: the next ledger of the run charges them."""

import json
import subprocess
import sys
import time

import pytest

from moejax.cost import starting
from moejax.cost.bill import read
from moejax.cost.ledger import Ledger
from moejax.cost.prices import Price

PROGRAM = """
import sys, time
from moejax.cost import starting
starting.begin(sys.argv[1])
print("ready", flush=True)
time.sleep(60)
"""


def opened(path, **changes):
    options = {
        "run_id": "r", "stage": "pretrain", "hardware": "cpu", "devices": 2,
        "price": Price(1800.0, "user", "a test", "2025"), "peak_flops": None,
        "backfill_seconds": 0.0,
    } | changes  # fmt: skip
    return Ledger.open(path / "ledger.jsonl", **options)


def left(folder):
    return list(folder.glob(".starting-*"))


@pytest.fixture()
def run(tmp_path):
    opened(tmp_path).close("interrupted")
    yield tmp_path
    starting.end()


def killed_start(folder):
    """A process that is killed while it starts; seconds that it lived."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.2)
    process.kill()
    lived = time.monotonic() - begun
    process.communicate()
    return lived


def test_a_killed_start_is_charged_by_the_next_ledger_once(run):
    lived = killed_start(run)
    assert len(left(run)) == 1
    second = opened(run)
    assert left(run) == []
    assert second.total_dollars == pytest.approx(lived, abs=1.0)  # $1 a second
    second.close("completed")
    bill = read(run)
    assert [part["status"] for part in bill["segments"]] == ["interrupted", "killed", "completed"]
    assert lived - 1.0 <= bill["seconds"]["startup"] <= lived + 0.1
    assert bill["redone"]["steps"] == 0
    opened(run).close("completed")
    assert len(read(run)["segments"]) == 4


def test_a_process_whose_ledger_opened_is_not_charged_twice(run):
    starting.begin(run)
    assert len(left(run)) == 1
    copy = left(run)[0].read_text()
    name = left(run)[0].name
    opened(run, backfill_seconds=3.0).close("completed")
    assert left(run) == []
    (run / name).write_text(copy)  # as if it had been killed between the two
    opened(run).close("completed")
    assert read(run)["seconds"]["startup"] == pytest.approx(3.0)
    assert len(read(run)["segments"]) == 3


def test_a_start_that_goes_on_is_left_alone(run):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        opened(run).close("completed")
        assert len(left(run)) == 1 and len(read(run)["segments"]) == 2
    finally:
        process.kill()
        process.communicate()


def test_it_writes_nothing_where_no_run_is_and_nothing_stays(tmp_path, run):
    starting.begin(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    starting.begin(run)
    starting.end()
    assert left(run) == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"seconds": "x"}', '{"seconds": -1}'])
def test_a_damaged_file_is_passed_over(run, text):
    (run / ".starting-1-2").write_text(text)
    opened(run).close("completed")
    assert len(read(run)["segments"]) == 2


def test_what_is_kept_names_the_process(run):
    starting.begin(run)
    record = json.loads(left(run)[0].read_text())
    assert record.keys() == {
        "pid", "process_ticks", "boot_id", "host", "process_start", "seconds"
    }  # fmt: skip
