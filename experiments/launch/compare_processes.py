"""Loss curves of several processes against one process of one device: how far apart they are.

    python experiments/launch/compare_processes.py [--steps=20] [--layouts=NAME,NAME]

An MoE model of 64 experts, 8 a token, in FP32, with AdamW at 1e-3, is trained on the same global
batches by ``moejax launch`` on this machine's CPU; virtual devices stand in for real ones. Prints
a table, and the first step that is more than 1e-5 apart.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile

import moejax
from moejax.training.metrics import read_metrics

LIMIT = 1e-5
CONFIG = f"""
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "model": {{"vocab_size": 264, "d_model": 64, "num_layers": 3, "first_k_dense": 1,
                  "dtype": "float32", "attention": {{"num_heads": 4}}}},
        "moe": {{"num_experts": 64, "top_k": 8, "d_expert": 16, "num_shared_experts": 1}},
        "router": {{"name": "deepseek_v3"}},
        "data": {{"source": "text", "tokenizer": "bytes",
                 "path": {str(pathlib.Path(moejax.__file__).parent / "models")!r}}},
        "train": {{"steps": 20, "batch_size": 16, "seq_len": 64, "log_every": 1}},
        "optim": {{"learning_rate": 1e-3, "warmup_steps": 2}},
    }})
"""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes, devices of each, and the mesh over them all."""

    processes: int
    devices: int
    mesh: str


LAYOUTS = {
    "2x2 data 2 x expert 2": Layout(2, 2, "data=2,expert=2"),
    "2x2 expert 4": Layout(2, 2, "expert=4"),
    "2x2 tensor 4": Layout(2, 2, "tensor=4"),
    "2x2 fsdp 2 x tensor 2": Layout(2, 2, "fsdp=2,tensor=2"),
    "4x2 data 2 x expert 4": Layout(4, 2, "data=2,expert=4"),
    "4x2 fsdp 8": Layout(4, 2, "fsdp=8"),
    "4x2 fsdp 2 x expert 2 x tensor 2": Layout(4, 2, "fsdp=2,expert=2,tensor=2"),
}


def launched_losses(
    config: pathlib.Path, workdir: pathlib.Path, layout: Layout, *settings: str
) -> list[float]:
    """The training losses of a launched run, step by step.

    Args:
      config: a config file with ``train.log_every`` 1.
      workdir: for the run; new.
      layout: where it runs.
      settings: ``FIELD=VALUE`` of the config.

    Raises:
      subprocess.CalledProcessError: the run failed; it has said why.
    """
    mesh = [f"mesh.{axis}" for axis in layout.mesh.split(",") if axis]
    subprocess.run(
        [
            sys.executable, "-m", "moejax.cli", "launch", f"--processes={layout.processes}",
            f"--devices-per-process={layout.devices}", "--", "train", f"--config={config}",
            f"--workdir={workdir}", *(f"--config.{setting}" for setting in (*mesh, *settings)),
        ],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def compare(one: list[float], other: list[float]) -> tuple[float, int | None]:
    """The largest relative difference of two curves, and the first step beyond the limit."""
    apart = [abs(a - b) / abs(a) for a, b in zip(one, other, strict=True)]
    return max(apart), next((i + 1 for i, value in enumerate(apart) if value > LIMIT), None)


def main() -> int:
    """Prints the table; 1 if a curve is further apart than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="names, all if left out")
    options = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config = folder / "config.py"
        config.write_text(CONFIG)
        steps = f"train.steps={options.steps}"
        one = launched_losses(config, folder / "one", Layout(1, 1, ""), steps)
        print(f"one device: loss {one[0]:.6f} at step 1, {one[-1]:.6f} at step {len(one)}")
        print("| processes x devices, mesh | largest relative difference | beyond 1e-5 at step |")
        print("|---|---|---|")
        for label in options.layouts.split(","):
            run = folder / label.replace(" ", "-")
            apart, first = compare(one, launched_losses(config, run, LAYOUTS[label], steps))
            print(f"| {label} | {apart:.1e} | {first or 'none'} |", flush=True)
            worst = max(worst, apart)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
