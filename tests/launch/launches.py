"""``moejax launch`` as a user starts it, for the tests."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import psutil

from moejax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
SOON = 120.0  # for a launch to get to its first steps, on a slow machine


def environment() -> dict[str, str]:
    """Variables of a launch: this checkout, and the tests' compilation cache."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def command(*words: str, processes: int = 2, devices: int = 2) -> list[str]:
    """The command line of a launch; ``words`` are those of ``moejax train``."""
    flags = [f"--processes={processes}", f"--devices-per-process={devices}"]
    return [sys.executable, "-m", "moejax.cli", "launch", *flags, "--", "train", *words]


def launch(*words: str, processes: int = 2, devices: int = 2) -> subprocess.CompletedProcess:
    """Runs a launch to its end."""
    return subprocess.run(
        command(*words, processes=processes, devices=devices), env=environment(),
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@contextlib.contextmanager
def started(*words: str) -> Iterator[subprocess.Popen]:
    """A launch that goes on; ended with the block."""
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(process: subprocess.Popen) -> list[psutil.Process]:
    """The job's processes, by their numbers."""
    number = lambda child: next(
        int(word.partition("=")[2]) for word in child.cmdline() if word.startswith("--process-id=")
    )
    found = [child for child in psutil.Process(process.pid).children() if child.cmdline()]
    return sorted((c for c in found if "moejax.launch.child" in c.cmdline()), key=number)


def wait_for_steps(process: subprocess.Popen, workdir: pathlib.Path, steps: int) -> None:
    """Waits until a run has logged so many steps."""
    deadline = time.monotonic() + SOON
    while len(losses(workdir)) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no steps"
        time.sleep(0.1)


def losses(workdir: pathlib.Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def summary(workdir: pathlib.Path) -> dict:
    """What ``summary.json`` holds."""
    return json.loads((workdir / "summary.json").read_text())
