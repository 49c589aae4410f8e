"""Ledgers of other processes: killed at any moment, writing at once, and under a changed clock."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest

from moejax.cost import ledger
from moejax.cost.bill import read
from moejax.cost.ledger import Ledger
from moejax.cost.prices import Price

# Forks so many writers, each with a ledger in a folder of its own (or all in one), before it has
# any thread. A writer says in ``began`` when its ledger was open, by the clock that all processes
# of a machine share, and trains until it is killed, or so many tokens.
WRITERS = """
import os, sys, time
from moejax.cost import ledger
from moejax.cost.prices import Price

folder, number, shared, tokens = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
flush = [float(seconds) for seconds in sys.argv[5].split(",")]

def write(i):
    ledger.FLUSH_SECONDS = flush[i % len(flush)]
    own = f"{folder}/{i}"
    os.makedirs(own)
    begun = time.monotonic()
    bill = ledger.Ledger.open(
        f"{folder if shared == 'shared' else own}/ledger.jsonl", run_id="r", stage="pretrain",
        hardware="cpu", devices=1, price=Price(1.0, "user", "test", "2025"), peak_flops=1e9,
        backfill_seconds=0.0,
    )
    with open(f"{own}/began.part", "w") as file:
        file.write(repr(begun))
    os.rename(f"{own}/began.part", f"{own}/began")
    bill.enter("train")
    while tokens < 0 or bill.tokens < tokens:
        bill.add(1, 1.0, 1)
        time.sleep(0.005)
    bill.close("completed")
    os._exit(0)

pids = []
for i in range(number):
    pid = os.fork()
    if not pid:
        write(i)
    pids.append(pid)
print(*pids, flush=True)
sys.stdin.read()
for pid in pids:
    os.waitpid(pid, 0)
"""


def writers(folder, number, *, shared=False, tokens=-1, flush=(ledger.FLUSH_SECONDS,)):
    """The process that forks writers, and their ids."""
    place = "shared" if shared else "own"
    flushes = ",".join(map(str, flush))
    command = [sys.executable, "-c", WRITERS, str(folder), str(number), place, str(tokens), flushes]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # not in a context: its exit would wait for writers that nobody has killed yet
    return process, [int(word) for word in process.stdout.readline().split()]


def when_open(folder, i):
    """When a writer's ledger was open, by the monotonic clock; waits for it."""
    deadline = time.monotonic() + 30
    while not (folder / str(i) / "began").exists():
        assert time.monotonic() < deadline, "a writer never began"
        time.sleep(0.005)
    return float((folder / str(i) / "began").read_text())


def whole_lines(path):
    return path.read_bytes().rpartition(b"\n")[0].split(b"\n")


def test_sigkill_at_50_random_moments_costs_at_most_an_interval(tmp_path):
    """Every other writer flushes 50 times a second, so that kills fall into the writing too."""
    rng = random.Random(time.time_ns())
    moments = sorted((rng.uniform(0.0, 1.9), i) for i in range(50))
    process, pids = writers(tmp_path, 50, flush=(ledger.FLUSH_SECONDS, 0.02))
    try:
        began = [when_open(tmp_path, i) for i in range(50)]
        start = time.monotonic()
        lived, before = {}, {}
        for moment, i in moments:
            time.sleep(max(0.0, start + moment - time.monotonic()))
            assert read(tmp_path / str(i))["status"] == "running"
            before[i] = whole_lines(tmp_path / str(i) / "ledger.jsonl")
            os.kill(pids[i], signal.SIGKILL)
            lived[i] = time.monotonic() - began[i]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # until it is waited for, an id belongs to the dead
    deadline = time.monotonic() + 30
    while any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "a process outlived SIGKILL"
        time.sleep(0.01)
    slack = 0.7  # a busy machine wakes threads late
    for i in range(50):
        found = read(tmp_path / str(i))  # a zombie, which is not waited for yet, runs no more
        assert found["status"] == "killed"
        assert lived[i] - 1.0 - slack <= found["wall_seconds"] <= lived[i] + slack, (i, moments)
        assert found["tokens"] > 0 or lived[i] < 1.0 + slack
        after = whole_lines(tmp_path / str(i) / "ledger.jsonl")
        assert after[: len(before[i])] == before[i]
        assert [json.loads(line)["event"] for line in after].count("close") == 0
    process.communicate("")
    assert {read(tmp_path / str(i))["status"] for i in range(50)} == {"killed"}


def test_two_processes_at_once_lose_nothing(tmp_path):
    process, _ = writers(tmp_path, 2, shared=True, tokens=60, flush=(0.0005,))
    process.communicate("", timeout=60)
    found = read(tmp_path)
    assert [(part["status"], part["tokens"]) for part in found["segments"]] == [
        ("completed", 60), ("completed", 60),
    ]  # fmt: skip
    # One may see the other's line half written and begin a line to be safe, which leaves it empty.
    lines = [json.loads(line) for line in whole_lines(tmp_path / "ledger.jsonl") if line]
    assert len(lines) > 100
    names = [line["segment"] for line in lines]
    changes = sum(a != b for a, b in itertools.pairwise(names))
    assert changes > 10  # they did write in turns


def opened(path, **changes):
    options = {
        "run_id": "r", "stage": "pretrain", "hardware": "cpu", "devices": 1,
        "price": Price(3600.0, "user", "a test", "2025"), "peak_flops": None,
        "backfill_seconds": 0.0,
    } | changes  # fmt: skip
    return Ledger.open(path / "ledger.jsonl", **options)


def test_a_line_that_another_process_tore_does_not_swallow_the_next(tmp_path):
    bill = opened(tmp_path)
    with open(tmp_path / "ledger.jsonl", "ab") as other:
        other.write(b'{"segment": "other", "event": "charge", "sec')
    bill.add(7)
    bill.close("completed")
    assert (read(tmp_path)["status"], read(tmp_path)["tokens"]) == ("completed", 7)


@pytest.mark.parametrize("jump", [-5000.0, 5000.0])
def test_a_wall_clock_that_is_set_changes_no_duration(tmp_path, monkeypatch, jump):
    """Set during a run and between two segments: ten seconds are ten seconds."""
    now = {"monotonic": 50.0, "wall": 1.7e9}
    fake = types.SimpleNamespace(
        monotonic=lambda: now["monotonic"], strftime=time.strftime,
        gmtime=lambda: time.gmtime(now["wall"]),
    )  # fmt: skip
    monkeypatch.setattr(ledger, "time", fake)
    bill = opened(tmp_path)
    bill.enter("train")
    now["monotonic"] += 10
    now["wall"] += 10 + jump
    bill.close("interrupted")
    now["wall"] += jump
    bill = opened(tmp_path)
    bill.enter("train")
    now["monotonic"] += 5
    bill.close("completed")
    found = read(tmp_path)
    assert found["wall_seconds"] == 15.0 and found["dollars"] == pytest.approx(15.0)
    assert found["seconds"]["train"] == 15.0
    # The time between segments has no other clock; backwards it is none, and none is billed.
    assert found["idle"]["seconds"] == max(jump, 0.0)


def test_a_clock_that_is_set_does_not_make_a_running_process_look_dead(tmp_path, monkeypatch):
    """psutil reckons start times from the wall clock's boot time, which moves with the clock."""
    with opened(tmp_path):
        real = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600.0)
        assert read(tmp_path)["status"] == "running"
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().replace('"process_ticks":', '"process_ticks":9').splitlines()
    path.write_text(lines[0] + "\n")
    assert read(tmp_path)["status"] == "killed"  # the id now belongs to another process


def test_start_up_is_back_filled_once_from_the_start_of_the_process(tmp_path):
    program = """
import sys, time
from moejax.cost.ledger import Ledger
from moejax.cost.prices import Price
Ledger.open(sys.argv[1], run_id="r", stage="pretrain", hardware="cpu", devices=1,
            price=Price(1.0, "user", "test", "2025"), peak_flops=1e9)
print("ready", flush=True)
time.sleep(60)
"""
    begun = time.monotonic()
    command = [sys.executable, "-c", program, str(tmp_path / "ledger.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    elapsed = time.monotonic() - begun
    process.kill()
    process.communicate()
    startup = read(tmp_path)["seconds"]["startup"]
    assert elapsed - 0.5 < startup < elapsed + 0.1
