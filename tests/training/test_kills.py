"""SIGKILL at random moments, and other faults, in real processes: the scripts that count them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "experiments" / "launch"


def script(name, *arguments):
    command = [sys.executable, str(LAUNCH / name), *arguments]
    paths = os.pathsep.join(filter(None, [str(LAUNCH.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_ten_kills_lose_neither_bits_nor_seconds(tmp_path):
    """Two in each place: start-up, compile, step, save, validation. The parameters are those of the
    uninterrupted run, and each kill costs the ledger a second at most."""
    file = tmp_path / "kills.json"
    done = script("kill_and_resume.py", "--kills=10", f"--output={file}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(file.read_text())
    assert result["kills"] == 10 and result["failures"] == [] and result["most_lost"] <= 1.0
    assert all(run == {"parameters": True, "losses": True} for run in result["runs"])
    assert len(result["by_place"]) >= 4  # where a kill hits is a matter of chance


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["bit flipped", "SIGTERM in a compile", "loss spike"])
def test_a_fault_in_a_real_process(fault):
    done = script("faults.py", f"--only={fault}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"| {fault}" in done.stdout and "FAILED" not in done.stdout
