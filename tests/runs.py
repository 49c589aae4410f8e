"""A tiny run for the tests of the training loop and of the command line."""

import json
import pathlib
import random

import jax
import numpy as np

from moejax import cli
from moejax.training import restore

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "model": {"vocab_size": 260, "d_model": 16, "num_layers": 2, "first_k_dense": 1,
                  "attention": {"num_heads": 2}, "embedding_multiplier": 4.0},
        "moe": {"num_experts": 4, "top_k": 2, "d_expert": 8, "num_shared_experts": 1},
        "router": {"name": "deepseek_v3", "bias_step": 0.01},
        "data": {"source": "text", "path": PATH, "tokenizer": "bytes"},
        "train": {"steps": 6, "batch_size": 8, "seq_len": 32, "log_every": 1},
        "optim": {"learning_rate": 0.01, "warmup_steps": 2},
        "checkpoint": {"every_steps": 2},
    })
"""


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """A config file and its corpus: 40 short files of made-up sentences."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "router",
        "sends",
        "each",
        "token",
        "to",
        "few",
        "of",
        "many",
        "experts",
        "and",
        "counts",
        "cost",
    ]
    for i in range(40):
        text = " ".join(rng.choice(words) for _ in range(120)) + "\n"
        (corpus / f"{i}.txt").write_text(text)
    path = folder / "tiny.py"
    path.write_text(CONFIG.replace("PATH", repr(str(corpus))))
    return path


def letters(prompts_each: int) -> tuple[list[str], list[str]]:
    """Questions and answers: a letter, asked for by its number."""
    prompts = [f"letter {i} of {n}:" for i in range(26) for n in range(prompts_each)]
    return prompts, [chr(ord("a") + int(prompt.split()[1])) * 3 for prompt in prompts]


def train(config: pathlib.Path, workdir: pathlib.Path, *settings: str) -> int:
    """``moejax train`` in this process; returns its exit status."""
    flags = [f"--config.{setting}" for setting in settings]
    return cli.main(["train", f"--config={config}", f"--workdir={workdir}", *flags])


def parameters(workdir: pathlib.Path) -> list[np.ndarray]:
    """The variables of a run's newest good checkpoint."""
    _, variables = restore.load(workdir)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]


def assert_same(got: pathlib.Path, wanted: pathlib.Path) -> None:
    """Both runs ended with the same bits."""
    for a, b in zip(parameters(got), parameters(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def summary(workdir: pathlib.Path) -> dict:
    """What ``summary.json`` holds."""
    return json.loads((workdir / "summary.json").read_text())
