"""FP8 beside FP32: how far DeepSeek-V3's FP8 recipe moves the loss of a tiny MoE.

One run a seed and precision, on the Python standard library's source, nothing else changed:

    for seed in 0 1 2; do for precision in native fp8; do
      moejax train --config=experiments/low_precision.py --config.seed=$seed \\
        --config.model.precision=$precision --workdir=runs/low_precision/$precision-$seed
    done; done
    python experiments/low_precision.py runs/low_precision

Widths are whole tiles of 128 channels, and an expert has some 512 rows a step, four tiles along the
tokens. Hardware: 2 CPU cores. Result: results/low_precision.
"""

import json
import pathlib
import sys

import ml_collections
import numpy as np

LAST_STEPS = 50


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "stage": "pretrain",
            "model": {
                "vocab_size": 1024,
                "d_model": 128,
                "num_layers": 3,
                "first_k_dense": 1,
                "attention": {"num_heads": 2},
                "embedding_multiplier": 11.0,
                "dtype": "float32",
                "precision": "native",
            },
            "moe": {"num_experts": 8, "top_k": 2, "d_expert": 128, "num_shared_experts": 1},
            "router": {"name": "deepseek_v3", "bias_step": 0.01, "routed_scale": 1.0},
            "data": {"source": "stdlib", "tokenizer": "bpe", "bpe_vocab_size": 1024},
            "train": {"steps": 300, "batch_size": 16, "seq_len": 128, "log_every": 1},
            "optim": {"learning_rate": 3e-3, "warmup_steps": 30, "final_fraction": 0.1},
            "checkpoint": {"every_steps": 300},
        }
    )


def losses(run: pathlib.Path) -> np.ndarray:
    """The training loss of every step of a run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if "loss" in line])


def compare(folder: pathlib.Path, other: str = "fp8") -> list[str]:
    """A line a seed: the losses of ``native-SEED`` and ``other-SEED``, and their relative error.

    That is of the mean training loss of the last 50 steps, of the held-out loss, and, without its
    sign, of the training loss of each step, on average.
    """
    rows = []
    for native in sorted(folder.glob("native-*")):
        seed = native.name.removeprefix("native-")
        pair = native, folder / f"{other}-{seed}"
        last = [losses(run)[-LAST_STEPS:].mean() for run in pair]
        held_out = [json.loads((run / "summary.json").read_text())["val_loss"] for run in pair]
        steps = np.abs(losses(pair[1]) / losses(pair[0]) - 1)
        errors = [100 * (b / a - 1) for a, b in (last, held_out)]
        rows.append(
            f"| {seed} | {last[0]:.4f} | {last[1]:.4f} | {errors[0]:+.2f} % "
            f"| {held_out[0]:.4f} | {held_out[1]:.4f} | {errors[1]:+.2f} % "
            f"| {100 * steps.mean():.2f} % |"
        )
    return rows


if __name__ == "__main__":
    print("\n".join(compare(pathlib.Path(sys.argv[1]), *sys.argv[2:])))
