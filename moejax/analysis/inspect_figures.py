"""The figures of ``moejax inspect``, from what its ``inspect.json`` holds and nothing else."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from moejax.analysis.curves import save_figure
from moejax.config import UserError

MOST_PANELS = 8
BLUE, RED, GREY = "#4878a8", "#c8553d", "#777777"


def draw(result: Mapping[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what was measured, a file each; files of what was not measured are taken away.

    Args:
      result: what ``moejax.analysis.inspect.inspect`` returns.
      folder: where the SVG files go.

    Raises:
      OSError: a file cannot be written.
    """
    written = []
    for name, draw_one in FIGURES.items():
        path = folder / f"{name}.svg"
        if result.get(name) is None:
            path.unlink(missing_ok=True)
        else:
            written.append(save_figure(draw_one(result), path))
    return written


def figure(result: Mapping[str, Any], name: str) -> plt.Figure:
    """One of the figures, for a notebook to show.

    Args:
      result: what ``moejax.analysis.inspect.inspect`` returns.
      name: of ``FIGURES``.

    Raises:
      UserError: what the figure shows was not measured; with the reason.
    """
    if result.get(name) is None:
        raise UserError(f"{name} was not measured: {result['left_out'].get(name, 'no reason')}")
    drawn = FIGURES[name](result)
    plt.close(drawn)
    return drawn


def _load(result: Mapping[str, Any]) -> plt.Figure:
    """Load by layer and expert over its fair share, and the gate mass beside it."""
    layers, experts = len(result["layers"]), result["num_experts"]
    height = 1.6 + 0.22 * layers
    figure, panels = plt.subplots(1, 2, figsize=(9.6, height), layout="constrained")
    for axes, name, title in zip(panels, ("load", "gate_mass"), ("load", "gate mass"), strict=True):
        image = _heat(axes, np.array(result[name]) * experts, 2.0)
        axes.set_title(f"{title}, over a fair share")
        axes.set_xlabel("expert")
        axes.set_yticks(range(layers), result["layers"])
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, extend="max")
    return figure


def _coactivation(result: Mapping[str, Any]) -> plt.Figure:
    """Of the tokens of the row's expert, the share that the column's computes too."""
    matrices = [np.array(layer) for layer in result["coactivation"]]
    for matrix in matrices:
        np.fill_diagonal(matrix, np.nan)
    top = np.nanmax([np.nanmax(m) if m.size > 1 else 0 for m in matrices]) or 1.0
    figure, panels = _panels(result, 2.6, 2.4)
    for axes, i in panels:
        image = _heat(axes, matrices[i], top)
        axes.set_xlabel("also through expert")
        axes.set_ylabel("tokens of expert")
    figure.colorbar(image, ax=[axes for axes, _ in panels])
    return figure


def _saturation(result: Mapping[str, Any]) -> plt.Figure:
    """Overlap with the newest checkpoint's routing, and flips from one to the next, over steps."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 3.2), layout="constrained", sharex=True
    )
    saturation, flips = result["saturation"], result["flip_rate"]
    _by_layer(left, saturation["steps"], saturation["by_layer"], result["layers"])
    chance = np.mean(result["by_layer"]["experts_per_token"]) / result["num_experts"]
    left.axhline(chance, color=GREY, linestyle=":", linewidth=1, label="chance")
    left.set_title(f"overlap with the experts at step {saturation['reference']}")
    left.legend(frameon=False, fontsize="small")
    ends = [after for _, after in flips["steps"]]
    _by_layer(right, ends, flips["by_layer"], result["layers"])
    right.set_title("tokens whose experts changed")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1.02)
        _plain(axes)
    return figure


def _domains(result: Mapping[str, Any]) -> plt.Figure:
    """Share of each domain's tokens at each expert, over K / E."""
    domains = result["domains"]
    fair = np.mean(result["by_layer"]["experts_per_token"]) / result["num_experts"]
    names = domains["names"]
    figure, panels = _panels(result, 3.4, 1.2 + 0.25 * len(names))
    for axes, i in panels:
        share = np.array(domains["share"][i]).T / max(fair, 1e-9)
        image = _heat(axes, share, 2.0)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("expert")
    figure.colorbar(image, ax=[axes for axes, _ in panels], extend="max")
    figure.suptitle("share of a domain's tokens, over the mean expert's", fontsize="medium")
    return figure


def _vocabulary(result: Mapping[str, Any]) -> plt.Figure:
    """How far a token id settles the experts, by layer."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for view, colour in (("input", BLUE), ("target", RED), ("prediction", GREY)):
        values = [np.nan if v is None else v for v in result["by_layer"][f"vocabulary_{view}"]]
        axes.plot(result["layers"], values, "o-", color=colour, markersize=4, label=view)
    axes.set_title("how far the token id settles the experts (1: wholly)")
    axes.set_xlabel("layer")
    axes.set_ylim(0, 1.02)
    axes.set_xticks(result["layers"])
    axes.legend(frameon=False, fontsize="small")
    _plain(axes)
    return figure


def _masked(result: Mapping[str, Any]) -> plt.Figure:
    """Loss over how many of each token's best experts are masked."""
    curve = result["masked_best_experts"]
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(curve["masked"], curve["loss"], "o-", color=RED, markersize=4)
    axes.set_xlabel(f"best experts masked in every layer, of {result['num_experts']}")
    axes.set_ylabel("nats per token")
    axes.set_xticks(curve["masked"])
    _plain(axes)
    return figure


def _layers(result: Mapping[str, Any]) -> plt.Figure:
    """The measures by layer that have one number a layer."""
    measures = {
        name: values for name, values in result["by_layer"].items()
        if not name.startswith("vocabulary_")
    }  # fmt: skip
    columns = 4
    rows = -(-len(measures) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(9.6, 1.9 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(measures) :]:
        axes.set_visible(False)
    for axes, (name, values) in zip(grid.flat, measures.items(), strict=False):
        numbers = [np.nan if value is None else value for value in values]
        axes.plot(result["layers"], numbers, "o-", color=BLUE, markersize=3, linewidth=1)
        axes.set_title(name.replace("_", " "), fontsize="small")
        if np.nanmin([0.0, *numbers]) >= 0:
            axes.set_ylim(0, 1.1 * (np.nanmax([0.0, *numbers]) or 1.0))
        axes.set_xticks(result["layers"])
        axes.tick_params(labelsize="x-small")
        _plain(axes)
    return figure


def _panels(result: Mapping[str, Any], width: float, height: float):
    """A figure with a panel a layer, evenly spread layers where there are many."""
    layers = result["layers"]
    count = min(len(layers), MOST_PANELS)
    shown = np.unique(np.linspace(0, len(layers) - 1, count).astype(int))
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns + 1, height * rows), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    panels = [(axes, int(i)) for axes, i in zip(grid.flat, shown, strict=False)]
    for axes, i in panels:
        axes.set_title(f"layer {layers[i]}")
    return figure, panels


def _heat(axes: plt.Axes, values: np.ndarray, top: float):
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes.imshow(
        values, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest"
    )


def _by_layer(axes: plt.Axes, steps: list[int], values: list[list[float]], layers: list[int]):
    """One line a layer over steps, early layers dark and late ones light."""
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(layers)))
    for layer, line, colour in zip(layers, np.array(values).T, colours, strict=True):
        label = f"layer {layer}" if len(layers) <= MOST_PANELS else None
        axes.plot(steps, line, "o-", color=colour, markersize=3, linewidth=1, label=label)


def _plain(axes: plt.Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


FIGURES = {
    "load": _load,
    "coactivation": _coactivation,
    "saturation": _saturation,
    "domains": _domains,
    "vocabulary": _vocabulary,
    "masked_best_experts": _masked,
    "layers": _layers,
}
