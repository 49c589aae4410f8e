"""A tiny ablation for the tests: two routers of the tiny run's model."""

import json
import pathlib

from runs import write_config

from moejax import cli

CONFIG = """

def get_config():
    base = base_config().to_dict()
    base["optim"] |= {"schedule": "wsd", "decay_fraction": 0.5}
    base["train"] |= {"log_every": 2}
    return {
        "name": "tiny",
        "base": base,
        "variants": {"bias": {}, "aux": {"router": {"name": "softmax_topk", "balance_loss_weight": 0.01}}},
        "reference": "aux",
        "seeds": [0, 1],
        "budget": {"hold": "tokens", "amounts": [AMOUNT]},
        "keep_checkpoints": False,
    }
"""
TOKENS = 1536.0  # six steps


def write_ablation(folder: pathlib.Path) -> pathlib.Path:
    """An ablation's config file and its corpus."""
    run = write_config(folder)
    path = folder / "ablation.py"
    base = run.read_text().replace("get_config", "base_config")
    path.write_text(base + CONFIG.replace("AMOUNT", repr(TOKENS)))
    return path


def ablate(config: pathlib.Path, workdir: pathlib.Path, *flags: str) -> int:
    """``moejax ablate`` in this process; returns its exit status."""
    return cli.main(["ablate", f"--config={config}", f"--workdir={workdir}", *flags])


def results(workdir: pathlib.Path) -> dict[str, dict]:
    """Lines of ``results.jsonl`` by cell."""
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}
