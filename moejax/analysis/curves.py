"""Loss over dollars: the figure that every run ends with."""

import json
import math
import pathlib

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from moejax.training.metrics import read_metrics

FILE = "loss.svg"


def loss_over_dollars(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draws a run's loss over what it had cost by then, in bits per byte, beside its baselines.

    Training loss is per token; it is turned into bits per byte by the held-out text's bytes per
    token, so that both curves and the baselines share an axis.

    Args:
      workdir: a run directory with ``summary.json``.

    Returns:
      The SVG file, in the run directory.

    Raises:
      FileNotFoundError: the run has no summary.
    """
    folder = pathlib.Path(workdir)
    summary = json.loads((folder / "summary.json").read_text())
    rows = read_metrics(folder)
    training = [row for row in rows if row.get("loss") is not None]
    held_out = [row for row in rows if row.get("val_bits_per_byte") is not None]
    bits_per_nat = 1 / (math.log(2) * summary["bytes_per_token"])
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot(
        [row["dollars"] for row in training],
        [row["loss"] * bits_per_nat for row in training],
        color="#4878a8", linewidth=1, label="training",
    )  # fmt: skip
    axes.plot(
        [row["dollars"] for row in held_out],
        [row["val_bits_per_byte"] for row in held_out],
        "o-", color="#c8553d", markersize=4, label="held out",
    )  # fmt: skip
    for name, style in (("gzip", "--"), ("unigram", ":")):
        value = summary["baselines"][name]
        label = f"{'gzip -9' if name == 'gzip' else name} {value:.2f}"
        axes.axhline(value, color="#777777", linestyle=style, linewidth=1, label=label)
    axes.set_xlabel("US dollars spent, compilation included")
    axes.set_ylabel("bits per byte")
    axes.set_xlim(left=0)
    best = summary["val_bits_per_byte"]
    axes.set_title("" if best is None else f"{best:.3f} bits/byte for ${summary['dollars']:.4f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save_figure(figure, folder / FILE)


def save_figure(figure: plt.Figure, path: pathlib.Path) -> pathlib.Path:
    """Writes a figure as SVG and closes it; the same figure always gives the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "moejax"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
