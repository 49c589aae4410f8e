"""Auxiliary loss against bias: rules on fixed scores, and what each does to a router's gradient."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moejax.analysis import balance_rules, measure, probe
from moejax.analysis.figures import panel
from moejax.analysis.held_out import open_held_out
from moejax.analysis.live_runs import COLOURS
from moejax.analysis.recorded import RESULTS
from moejax.analysis.run_reader import read_run, restorer
from moejax.cost import text
from moejax.models import ModelConfig
from moejax.parallel import MeshConfig, make_mesh
from moejax.training import run_dir
from moejax.training.checkpoints import Checkpointer


def recorded_rules() -> str:
    """MaxVio after so many updates, from ``experiments/results/routers/balance_rules.json``."""
    found = json.loads((RESULTS / "routers" / "balance_rules.json").read_text())
    marks = next(iter(found.values())).keys()
    rows = [["rule", *marks]]
    rows += [
        [rule, *(f"{values[mark]:.3f}" for mark in marks)] for rule, values in found.items()
    ]  # fmt: skip
    return text.columns(rows)


def plot_rules(rules: Sequence[str], updates: int = 300) -> Figure:
    """MaxVio of rules of ``balance_rules`` on the same fixed scores, over updates."""
    figure, (axes,) = panel(6.4, 3.6)
    for rule, colour in zip(rules, COLOURS, strict=False):
        line = np.maximum(balance_rules.trajectory(rule, updates), 1e-3)
        axes.plot(np.arange(updates) + 1, line, label=rule, color=colour, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="update", ylabel="MaxVio before it")
    axes.legend(frameon=False, fontsize=8)
    return figure


@dataclasses.dataclass(frozen=True)
class Pull:
    """Gradients of a checkpoint's routers, by MoE layer.

    Attributes:
      step: of the checkpoint.
      ratio: norm of the auxiliary losses' gradient over that of the cross-entropy's.
      cosine: between the two; nan where there is no auxiliary loss.
    """

    step: int
    ratio: Float[np.ndarray, " L"]
    cosine: Float[np.ndarray, " L"]


def pulls(where: pathlib.Path) -> list[Pull]:
    """How hard a run's auxiliary losses pull its routers, and which way, at every checkpoint.

    On one held-out batch, routed as in use. Only the routers' own parameters are looked at; the
    auxiliary losses' gradient reaches what lies before a router as well.

    Args:
      where: the run's folder.
    """
    record = read_run(where, str(where))
    config = run_dir.recorded(record)
    held_out = open_held_out(
        config.data, seq_len=config.train.seq_len, tokenizer_folder=where / run_dir.TOKENIZER,
        fingerprint=record["data"]["fingerprint"],
    )  # fmt: skip
    batch = measure.read_text(held_out, config.train.batch_size, 1).batches[0]
    with Checkpointer(where / run_dir.CHECKPOINTS, config.checkpoint) as checkpoints:
        restore = restorer(config, checkpoints)
        with jax.set_mesh(make_mesh(MeshConfig())):
            return [_pull(config.model, step, restore(step), batch) for step in checkpoints.steps()]


def _pull(config: ModelConfig, step: int, variables: Mapping, batch: Mapping) -> Pull:
    gradient = lambda weights: _by_layer(
        probe.router_gradients(config, variables, batch, jnp.array(weights))
    )
    loss, auxiliary = gradient((1.0, 0.0)), gradient((0.0, 1.0))
    norm = lambda rows: np.linalg.norm(rows, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.sum(loss * auxiliary, axis=-1) / (norm(loss) * norm(auxiliary))
    return Pull(step, norm(auxiliary) / norm(loss), cosine)


def _by_layer(gradients: Mapping) -> Float[np.ndarray, "L P"]:
    """One row a layer, for models with one segment of MoE layers of one kind."""
    leaves = [np.asarray(leaf) for _, leaf in sorted(jax.device_get(gradients).items())]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=-1)


def pull_text(found: Mapping[str, list[Pull]]) -> str:
    """Ratio and cosine of each run's last checkpoint, by MoE layer."""
    rows = [["run", "step", "auxiliary over loss, by layer", "cosine, by layer"]]
    for name, history in found.items():
        last = history[-1]
        ratio = "  ".join(f"{value:.3f}" for value in last.ratio)
        cosine = "  ".join("-" if np.isnan(c) else f"{c:+.2f}" for c in last.cosine)
        rows.append([name, str(last.step), ratio, cosine])
    return text.columns(rows)


def plot_pulls(found: Mapping[str, list[Pull]]) -> Figure:
    """The ratio and the cosine over checkpoints, a colour a run, a line an MoE layer."""
    figure, (left, right) = panel(8.4, 3.2, columns=2)
    for (name, history), colour in zip(found.items(), COLOURS, strict=False):
        steps = [pull.step for pull in history]
        for layer in range(len(history[0].ratio)):
            label = name if layer == 0 else None
            left.plot(steps, [p.ratio[layer] for p in history], "o-", color=colour, markersize=3,
                      linewidth=1, label=label)  # fmt: skip
            right.plot(steps, [p.cosine[layer] for p in history], "o-", color=colour, markersize=3,
                       linewidth=1)  # fmt: skip
    right.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="step", ylabel="norm over the loss's gradient", ylim=(0, None))
    right.set(xlabel="step", ylabel="cosine with the loss's gradient", ylim=(-1, 1))
    left.legend(frameon=False, fontsize=8)
    return figure
