"""The watch over a job, on small programs: who ended, how, and that nobody is left."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moejax.config import UserError
from moejax.launch import supervisor
from moejax.launch.child import PARENT
from moejax.launch.shares import HOST_DEVICES, Share, shares
from moejax.launch.supervisor import Supervisor, describe

# A child gives its signs of life in the form of moejax.parallel.heartbeat, without its imports.
PRELUDE = """
import os, signal, sys, time
def sign(allowed=100.0, age=0.0):
    now = time.monotonic()
    with open(os.environ["MOEJAX_HEARTBEAT"], "w") as file:
        file.write(f"{now:.3f} {now - age:.3f} {allowed:.1f} train")
def live(seconds=60.0):
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        sign()
        time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(supervisor, "STOPPED_SECONDS", 0.6)
    monkeypatch.setattr(supervisor, "FAREWELL_SECONDS", 1.0)
    monkeypatch.setattr(supervisor, "SETTLE_SECONDS", 0.3)


def run(folder: pathlib.Path, *programs: str, during=lambda job: None):
    """A job of these programs; what came of it, and the lines that they printed."""
    lines: list[str] = []
    commands = [[sys.executable, "-c", PRELUDE + program] for program in programs]
    with Supervisor(
        commands, [Share({})] * len(programs), folder, stall_seconds=5.0, write=lines.append
    ) as job:
        during(job)
        outcome = job.wait()
    assert all(child.process.poll() is not None for child in job.children)
    return outcome, lines


def test_a_job_that_ends_well_and_lines_with_numbers(tmp_path):
    said = "print('hello', file=sys.stderr)"
    outcome, lines = run(tmp_path, said, said)
    assert outcome.status == 0 and not outcome.reason
    assert sorted(lines) == ["[0] hello\n", "[1] hello\n"]


def test_a_killed_process_is_named_and_the_others_are_ended(tmp_path):
    # The first to be seen is a survivor that jax aborts for it.
    outcome, _ = run(
        tmp_path, "live()", "time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)",
        "time.sleep(0.3); os.kill(os.getpid(), signal.SIGABRT)",
    )  # fmt: skip
    assert (outcome.status, outcome.culprit) == (1, 1)
    assert "killed by SIGKILL" in outcome.reason
    assert f"(pid {outcome.pid}) was killed by SIGKILL" in describe(outcome)


def test_an_exit_status_is_named_if_the_others_do_not_follow(tmp_path):
    outcome, _ = run(tmp_path, "live()", "sys.exit(3)")
    assert (outcome.status, outcome.culprit, outcome.reason) == (1, 1, "exit status 3")


@pytest.mark.parametrize("status", [1, 2])
def test_processes_that_end_alike_have_said_why_themselves(tmp_path, status):
    outcome, _ = run(tmp_path, f"sys.exit({status})", f"time.sleep(0.4); sys.exit({status})")
    assert outcome.status == status and not outcome.reason


def test_a_stopped_process_is_named(tmp_path):
    def stop(job):
        time.sleep(0.5)
        os.kill(job.children[1].process.pid, signal.SIGSTOP)

    outcome, _ = run(tmp_path, "live()", "live()", during=stop)
    assert (outcome.status, outcome.culprit) == (1, 1)
    assert "stopped for" in outcome.reason


def test_of_stuck_processes_the_one_furthest_behind_is_named(tmp_path):
    # Both wait, process 0 for process 1, which got on less lately.
    stuck = (
        "\nwhile True: sign(allowed=0.5, age=time.monotonic() - began + {late}); time.sleep(0.05)"
    )
    program = lambda late: "began = time.monotonic()" + stuck.format(late=late)
    outcome, _ = run(tmp_path, program(0.0), program(0.3))
    assert (outcome.status, outcome.culprit) == (1, 1)
    assert "stuck for" in outcome.reason and "'train'" in outcome.reason


def test_signals_reach_every_process(tmp_path):
    program = """
def note(number, frame):
    print(signal.Signals(number).name, file=sys.stderr)
    sys.exit(0)
signal.signal(signal.SIGTERM, note)
print("ready", file=sys.stderr)
live()
"""

    def ask(job):
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    outcome, lines = run(tmp_path, program, program, during=ask)
    assert outcome.status == 0
    assert [f"[{i}] SIGTERM\n" in lines for i in (0, 1)] == [True, True]


def test_nobody_is_left_when_the_launcher_itself_is_killed(tmp_path):
    child = (
        "import os, sys, time; from moejax.launch.child import end_with_parent; "
        "end_with_parent(int(os.environ['MOEJAX_LAUNCHER'])); print('up', file=sys.stderr); "
        "time.sleep(60)"
    )
    launcher = f"""
import os, pathlib, sys
from moejax.launch.shares import Share
from moejax.launch.supervisor import Supervisor
command = [sys.executable, "-c", {child!r}]
folder = pathlib.Path({str(tmp_path)!r})
with Supervisor([command] * 2, [Share({{}})] * 2, folder, stall_seconds=5.0) as job:
    print(*(child.process.pid for child in job.children), flush=True)
    job.wait()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    for _ in pids:
        assert "up" in process.stderr.readline()
    os.kill(pids[1], signal.SIGSTOP)  # one that can do nothing for itself
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(_lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_lives, pids))
    process.stdout.close()
    process.stderr.close()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_shares_of_a_cpu_replace_the_number_of_devices():
    inherited = {"XLA_FLAGS": f"--xla_a=1 {HOST_DEVICES}=8", "JAX_PLATFORMS": "cpu"}
    parts = shares(2, 3, inherited)
    assert [part.environment["XLA_FLAGS"] for part in parts] == [f"--xla_a=1  {HOST_DEVICES}=3"] * 2
    cores = [core for part in parts for core in part.cores]
    assert len(cores) == len(set(cores))
    assert len({len(part.cores) for part in parts}) == 1


def test_shares_of_gpus():
    parts = shares(2, None, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    assert [part.environment["CUDA_VISIBLE_DEVICES"] for part in parts] == ["4,5", "6,7"]
    with pytest.raises(UserError, match="2 x 3 devices are more than the 4 GPUs"):
        shares(2, 3, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    with pytest.raises(UserError, match="--processes = 0"):
        shares(0, 1)


def test_the_parent_is_named_to_children(tmp_path):
    outcome, lines = run(tmp_path, f"print(os.environ[{PARENT!r}], file=sys.stderr)")
    assert outcome.status == 0 and lines == [f"[0] {os.getpid()}\n"]
