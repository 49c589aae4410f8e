"""Small runs that a notebook trains while it is read, from the quickstart's config scaled down.

``MOEJAX_NOTEBOOK_SMALL=1`` makes them smaller still, for the tests; ``MOEJAX_NOTEBOOK_RUNS`` is
where they are kept (``../runs/notebooks``, as seen from the notebooks' folder, unless set). A run
that is there already is not trained again.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moejax import config as mechanism
from moejax.analysis.figures import BLUE, GREEN, GREY, RED, panel
from moejax.analysis.inspect import FOLDER, RESULT, inspect
from moejax.analysis.statistics import compare, verdict_text
from moejax.cost import text
from moejax.training import run_config
from moejax.training.metrics import read_metrics
from moejax.training.programs import ProgramCache
from moejax.training.train import train

# Notebooks run in their own folder.
QUICKSTART = pathlib.Path("..", "experiments", "quickstart.py")
SMALL, RUNS = "MOEJAX_NOTEBOOK_SMALL", "MOEJAX_NOTEBOOK_RUNS"
# Logged steps that a run's balance is averaged over.
LAST = 5
COLOURS = (BLUE, RED, GREEN, GREY, "#8a6bb1", "#d9a441", "#3b9c9c")

# Runs that differ in seeds and steps only share what is compiled.
PROGRAMS = ProgramCache()

# Edits of experiments/quickstart.py. A bias step ten times V3's, since runs are short.
SCALED = {
    "model.d_model": 64, "model.num_layers": 3, "model.vocab_size": 1024,
    "model.embedding_multiplier": 8.0,
    "moe.num_experts": 16, "moe.d_expert": 32,
    "data.bpe_vocab_size": 1024, "data.bpe_sample_bytes": 1_000_000,
    "data.max_validation_bytes": 100_000,
    "train.batch_size": 16, "train.log_every": 4, "train.eval_every": 0,
    "train.sample_tokens": 0, "cost.final": False,
}  # fmt: skip
# A model of bytes: no tokenizer to train, and little to compile.
TINY = SCALED | {
    "model.d_model": 32, "model.num_layers": 2, "model.first_k_dense": 0, "model.vocab_size": 257,
    "moe.num_experts": 8, "moe.d_expert": 16, "data.tokenizer": "bytes",
    "data.max_validation_bytes": 60_000,
    "train.steps": 60, "train.batch_size": 8, "train.seq_len": 64,
}  # fmt: skip


def small() -> bool:
    """Whether this is the small mode of the tests."""
    return os.environ.get(SMALL, "") not in ("", "0")


def folder(name: str) -> pathlib.Path:
    """Where a run is kept; runs of the small mode lie apart from the others."""
    root = os.environ.get(RUNS) or pathlib.Path("..", "runs", "notebooks")
    return pathlib.Path(root) / ("small" if small() else "full") / name


def config(edits: Mapping[str, Any] | None = None) -> run_config.RunConfig:
    """The quickstart's config scaled down, with further edits.

    Args:
      edits: values by dotted name; a whole block replaces one (``"router": {...}``).

    Raises:
      ConfigError: a field that does not exist, or values that do not go together.
    """
    blocks = mechanism.load(str(QUICKSTART), [])
    for name, value in {**(TINY if small() else SCALED), **(edits or {})}.items():
        *outer, last = name.split(".")
        block = blocks
        for part in outer:
            block = block.setdefault(part, {})
        block[last] = value
    return run_config.from_dict(blocks)


def run(
    name: str, edits: Mapping[str, Any] | None = None, *, steps: int = 200, checkpoints: int = 1
) -> pathlib.Path:
    """Trains a run, quietly, unless its folder holds it finished; returns the folder.

    What ``moejax train`` says on the way goes to ``notebook.log`` beside the run's folder.

    Args:
      name: of the folder.
      edits: as for ``config``.
      steps: optimizer steps; ``TINY``'s in the small mode.
      checkpoints: how many are kept, evenly spread, the last at the end.

    Raises:
      ConfigError: edits that cannot be used, or a folder that holds a run of another config.
      RunFailed: the run stopped on an error.
    """
    steps = TINY["train.steps"] if small() else steps
    where = folder(name)
    chosen = config({
        "train.steps": steps, "checkpoint.every_steps": steps // checkpoints,
        "checkpoint.keep_newest": checkpoints, **(edits or {}),
    })  # fmt: skip
    where.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(where.parent / "notebook.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        train(chosen, str(where), programs=PROGRAMS)
    return where


def runs(
    variants: Mapping[str, Mapping[str, Any]], *, seeds: int = 1, **how: int
) -> dict[str, list[pathlib.Path]]:
    """Trains each variant once a seed; in the small mode the first two, with two seeds at most.

    Args:
      variants: edits by name; names are those of folders too.
      seeds: how many, from 0; of the initial weights and of the order of the data.
      how: ``steps`` and ``checkpoints``, as for ``run``.

    Returns:
      Folders by variant, in the order of the seeds.
    """
    names = list(variants)[:2] if small() else list(variants)
    count = min(seeds, 2) if small() else seeds
    return {
        name: [
            run(f"{name}-seed{seed}", {**variants[name], "seed": seed}, **how)
            for seed in range(count)
        ]
        for name in names
    }


def curve(where: pathlib.Path, measure: str) -> tuple[Float[np.ndarray, " n"], ...]:
    """Steps and values of a measure of ``metrics.jsonl``, where it was written."""
    rows = [row for row in read_metrics(where) if row.get(measure) is not None]
    return np.array([row["step"] for row in rows]), np.array([row[measure] for row in rows])


def summary(where: pathlib.Path) -> dict[str, Any]:
    """What ``summary.json`` holds."""
    return json.loads((where / "summary.json").read_text())


def inspected(where: pathlib.Path) -> dict[str, Any]:
    """What ``moejax inspect`` measures of a run, from its file if that is there."""
    path = where / FOLDER / RESULT
    return json.loads(path.read_text()) if path.exists() else inspect(str(where), say=_no_word)


def _no_word(line: str) -> None:
    """Takes what ``inspect`` says on the way: a notebook has no use for it."""


def table(found: Mapping[str, list[pathlib.Path]]) -> str:
    """A line for each run: bits per byte on held-out text, and balance over its last steps."""
    rows = [["run", "bits/byte", "MaxVio, last steps", "dead experts"]]
    for folders in found.values():
        for where in folders:
            balance = curve(where, "router/max_violation")[1][-LAST:].mean()
            dead = int(curve(where, "router/dead_experts")[1][-1])
            bits = summary(where)["val_bits_per_byte"]
            rows.append([where.name, f"{bits:.4f}", f"{balance:.2f}", str(dead)])
    return text.columns(rows)


def verdicts(found: Mapping[str, list[pathlib.Path]], reference: str) -> str:
    """The runs' losses compared as `moejax ablate` does: paired by seed, corrected by Holm.

    Args:
      found: folders by variant, two seeds each at least.
      reference: the variant that the others are compared with.
    """
    bits = lambda folders: [summary(where)["val_bits_per_byte"] for where in folders]
    values = {name: dict(enumerate(bits(folders))) for name, folders in found.items()}
    told = compare(values, reference).differences
    return "\n".join(
        f"{name} against {reference}: {verdict_text(one)}" for name, one in told.items()
    )


def plot_curves(found: Mapping[str, list[pathlib.Path]], measures: Mapping[str, str]) -> Figure:
    """A panel for each measure over steps, a line for each run, a colour for each variant.

    Args:
      found: folders by variant.
      measures: the axis's label by measure.
    """
    figure, panels = panel(3.6 * len(measures), 2.9, columns=len(measures))
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for (name, folders), colour in zip(found.items(), COLOURS, strict=False):
            for number, where in enumerate(folders):
                shown = name if number == 0 else None
                axes.plot(*curve(where, measure), color=colour, linewidth=1, label=shown)
        axes.set(xlabel="step", ylabel=label)
    panels[0].legend(frameon=False, fontsize=8)
    return figure
