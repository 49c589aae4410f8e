"""A tiny run for the fault scripts: its config and corpus, made up, and its processes."""

import os
import pathlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

CONFIG = """
import ml_collections


def get_config():
    return ml_collections.ConfigDict({
        "model": {"vocab_size": 260, "d_model": 8, "num_layers": 1,
                  "attention": {"num_heads": 2}, "embedding_multiplier": 4.0},
        "moe": {"num_experts": 4, "top_k": 2, "d_expert": 8, "num_shared_experts": 1},
        "router": {"name": "deepseek_v3", "bias_step": 0.01},
        "data": {"source": "text", "path": PATH, "tokenizer": "bytes"},
        "train": {"steps": 60, "batch_size": 8, "seq_len": 32, "log_every": 1},
        "optim": {"learning_rate": 0.003, "warmup_steps": 2},
        "checkpoint": {"every_steps": 10},
    })
"""
WORDS = (
    "the", "a", "router", "sends", "each", "token", "to", "few", "of", "many", "experts", "and",
    "counts", "cost",
)  # fmt: skip


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """A config file and its corpus: 40 short files of made-up sentences."""
    corpus, rng = folder / "corpus", random.Random(0)
    corpus.mkdir(parents=True)
    for i in range(40):
        (corpus / f"{i}.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(120)) + "\n")
    path = folder / "tiny.py"
    path.write_text(CONFIG.replace("PATH", repr(str(corpus))))
    return path


class Process:
    """``moejax train`` in a process of its own, whose lines can be waited for.

    Attributes:
      begun: when it was started, by the monotonic clock.
      lines: what it has said so far.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str] | None = None):
        command = [sys.executable, "-m", "moejax.cli", "train", *arguments]
        root = str(pathlib.Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        settings = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.begun = time.monotonic()
        self.popen = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**settings, **(environment or {})},
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self.popen.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, wanted, timeout: float = 120.0) -> bool:
        """Waits until a line satisfies ``wanted``; False where the process ends before."""
        deadline, seen = time.monotonic() + timeout, 0
        with self._changed:
            while True:
                while seen < len(self.lines):
                    seen += 1
                    if wanted(self.lines[seen - 1]):
                        return True
                if not self._thread.is_alive() or time.monotonic() > deadline:
                    return False
                self._changed.wait(0.05)

    def end(self, timeout: float = 120.0) -> int:
        """Waits for the end; returns the exit status."""
        status = self.popen.wait(timeout)
        self._thread.join(timeout)
        return status

    def kill(self) -> float:
        """Kills it; returns the seconds that it lived."""
        self.popen.kill()
        lived = time.monotonic() - self.begun
        self.end()
        return lived
