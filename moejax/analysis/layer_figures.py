"""The pictures of 'Anatomy of an MoE layer': what ``layer_walk`` computed, drawn."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moejax.analysis.figures import BLUE, GREY, RED, panel
from moejax.analysis.layer_walk import (
    CARRIED,
    CONFIG,
    DEVICES,
    DRAWN_BLOCKS,
    ROUTER,
    WORDS,
    Walk,
    choose,
    dropped_share,
    kept,
    load,
    sent,
    sorted_rows,
)
from moejax.moe.dispatch import expert_capacity
from moejax.moe.dispatch.blocks import plan_blocks

EXPERTS, TOP_K = CONFIG.num_experts, CONFIG.top_k
GROUP = EXPERTS // ROUTER.num_groups
COLOURS = plt.get_cmap("tab20")(np.arange(EXPERTS) % 20)


def scores(w: Walk) -> Figure:
    """The router's scores, tokens by experts, and those that were chosen by score plus bias."""
    figure, (axes,) = panel(7.2, 4.2)
    image = axes.imshow(w.scores, aspect="auto", cmap="Greys", vmin=0, vmax=1)
    for token, experts in enumerate(w.expert):
        axes.scatter(experts, [token] * TOP_K, s=60, facecolor="none", edgecolor=RED, linewidth=1.4)
    _experts_along(axes)
    axes.set_yticks(range(len(WORDS)), WORDS)
    axes.set_title("sigmoid scores; red: the experts chosen")
    figure.colorbar(image, ax=axes)
    return figure


def selection(w: Walk, token: int) -> Figure:
    """One token: scores, bias on top, the groups that are kept, the experts chosen."""
    figure, (axes,) = panel(7.2, 3.2)
    places, biased = np.arange(EXPERTS), w.scores[token] + w.bias
    chosen = np.isin(places, w.expert[token])
    axes.bar(places - 0.2, w.scores[token], 0.38, color=GREY, label="score")
    colours = [RED if one else BLUE for one in chosen]
    axes.bar(places + 0.2, biased, 0.38, color=colours, label="score + bias (red: chosen)")
    for group in np.unique(w.expert[token] // GROUP):
        axes.axvspan(
            group * GROUP - 0.5, (group + 1) * GROUP - 0.5, color=BLUE, alpha=0.1, zorder=0
        )
    _experts_along(axes)
    axes.set_title(f"{WORDS[token]!r}: shaded, the {ROUTER.groups_kept} groups kept")
    axes.set_ylim(0, 1.15)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    return figure


def loads(w: Walk) -> Figure:
    """Load of each expert without and with the selection bias."""
    figure, (axes,) = panel(7.2, 2.6)
    places = np.arange(EXPERTS)
    axes.bar(
        places - 0.2, load(choose(w.scores, 0 * w.bias)), 0.38, color=GREY, label="scores alone"
    )
    axes.bar(places + 0.2, load(w.expert), 0.38, color=BLUE, label="with the bias")
    axes.axhline(w.expert.size / EXPERTS, color=RED, linestyle=":", label="fair share")
    _experts_along(axes)
    axes.set_ylabel("assignments")
    axes.legend(frameon=False, fontsize=8)
    return figure


def sorting(w: Walk, token: int) -> Figure:
    """Assignments in the order of tokens, above, and sorted by expert, below."""
    figure, axes = _bare(8.4, 2.4)
    flat, order = w.expert.reshape(-1), sorted_rows(w)
    row = np.argsort(order)
    for place in range(flat.size):
        _square(axes, place, 1.0, flat[place], place // TOP_K == token)
        _square(axes, place, 0.0, flat[order[place]], order[place] // TOP_K == token)
        mine = place // TOP_K == token
        axes.plot(
            [place + 0.5, row[place] + 0.5], [1.0, 0.35], color=RED if mine else GREY,
            linewidth=1.6 if mine else 0.4, alpha=1 if mine else 0.4,
        )  # fmt: skip
    for number, word in enumerate(WORDS):
        axes.text((number + 0.5) * TOP_K, 1.45, word, ha="center", fontsize=7)
    for expert in range(EXPERTS):
        places = np.flatnonzero(flat[order] == expert)
        if len(places):
            axes.text(places.mean() + 0.5, -0.25, expert, ha="center", fontsize=7)
    axes.text(-0.5, 1.17, "by token", ha="right", va="center", fontsize=8)
    axes.text(-0.5, 0.17, "by expert", ha="right", va="center", fontsize=8)
    axes.set(xlim=(-7, flat.size), ylim=(-0.4, 1.7))
    return figure


def blocks(w: Walk, token: int) -> Figure:
    """The rows of the dispatcher ``blocks``: an expert a block, white where a row is empty."""
    plan = plan_blocks(jnp.asarray(w.expert), EXPERTS, DRAWN_BLOCKS)
    source, height = np.asarray(plan.source), len(DRAWN_BLOCKS)
    figure, axes = _bare(8.4, 0.4 + 0.8 * height)
    for level, (size, group) in enumerate(zip(DRAWN_BLOCKS, plan.blocks, strict=True)):
        y, gap = float(height - 1 - level), 0.35
        axes.text(-0.5, y + 0.17, f"{size.rows} rows", ha="right", va="center", fontsize=8)
        for number in range(int(group.used)):
            left, expert = number * (size.rows + gap), int(group.expert[number])
            for i in range(size.rows):
                row = source[int(group.start) + number * size.rows + i]
                filled = row < w.expert.size
                _square(axes, left + i, y, expert if filled else None, row // TOP_K == token)
            axes.text(left + size.rows / 2, y + 0.42, expert, ha="center", fontsize=7)
    widest = max(
        int(group.used) * (size.rows + 0.35)
        for size, group in zip(DRAWN_BLOCKS, plan.blocks, strict=True)
    )
    axes.set(xlim=(-6, widest), ylim=(-0.15, height - 0.2))
    return figure


def combine(w: Walk, token: int, parts: Float[np.ndarray, "K D"]) -> Figure:
    """A token's output as a sum: each expert's answer times its gate, the shared expert's, all.

    Args:
      w: the layer.
      token: which token.
      parts: the gated answers of its experts in the order of ``w.expert``.
    """
    names = [
        f"expert {e}, gate {g:.2f}" for e, g in zip(w.expert[token], w.gate[token], strict=True)
    ]
    rows = [*parts, w.shared[token], w.y[token]]
    figure, axes = plt.subplots(figsize=(7.2, 2.4), layout="constrained")
    plt.close(figure)
    top = np.abs(rows).max()
    image = axes.imshow(rows, aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top)
    axes.axhline(len(rows) - 1.5, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [*names, "shared expert", "the layer's output"])
    axes.set_xlabel("dimension")
    figure.colorbar(image, ax=axes)
    return figure


def capacity(w: Walk) -> Figure:
    """Which choices find no slot at factor 1, and the share of them over factors."""
    figure, (left, right) = panel(8.4, 3.4, columns=2)
    tokens = len(WORDS)
    slots = expert_capacity(tokens, TOP_K, EXPERTS, 1.0)
    found = kept(w, 1.0, 0 * w.bias) < EXPERTS
    left.pcolormesh(found[::-1], cmap="RdYlGn", vmin=-0.4, vmax=1.4, edgecolor="white")
    left.set_yticks(np.arange(tokens) + 0.5, WORDS[::-1], fontsize=7)
    names = [f"choice {k + 1}" for k in range(TOP_K)]
    left.set_xticks(np.arange(TOP_K) + 0.5, names, fontsize=7)
    left.grid(False)
    left.set_title(f"without bias, {slots} slots an expert; red: dropped", fontsize=9)
    factors = np.linspace(0.5, 4, 15)
    for name, bias, colour in (("scores alone", 0 * w.bias, GREY), ("with the bias", w.bias, BLUE)):
        lost = [100 * dropped_share(w, factor, bias) for factor in factors]
        right.plot(factors, lost, "o-", color=colour, markersize=3, label=name)
    right.set(xlabel="capacity factor", ylabel="% of assignments dropped", ylim=(0, None))
    right.legend(frameon=False)
    return figure


def exchange(w: Walk) -> Figure:
    """Rows from each device to each other one, and rows sent over the limit on groups."""
    figure, (left, right) = panel(8.4, 3.0, columns=2)
    home = np.arange(len(WORDS)) // (len(WORDS) // DEVICES)
    owner = w.expert // (EXPERTS // DEVICES)
    rows = np.zeros((DEVICES, DEVICES), int)
    for here, there in zip(home, owner, strict=True):
        rows[here] += -(-np.bincount(there, minlength=DEVICES) // CARRIED)
    left.imshow(rows, cmap="Blues", vmin=0, vmax=2 * rows.max())
    left.grid(False)
    for (here, there), number in np.ndenumerate(rows):
        colour = GREY if here == there else "black"
        left.text(there, here, number, ha="center", va="center", color=colour)
    left.set(xlabel="to device", ylabel="from device", xticks=range(DEVICES), yticks=range(DEVICES))
    left.set_title("rows; the diagonal stays at home", fontsize=9)
    limits = range(1, ROUTER.num_groups + 1)
    right.bar(limits, [sent(w, limit)["rows_sent"] for limit in limits], color=BLUE, width=0.6)
    right.set(xlabel="groups a token may choose from", ylabel="rows sent", xticks=limits)
    return figure


def _bare(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    plt.close(figure)
    axes.set_axis_off()
    return figure, axes


def _square(axes: Axes, x: float, y: float, expert: int | None, marked: bool) -> None:
    """A row of an assignment: its expert's colour, white if empty, a red edge for the token."""
    face = "white" if expert is None else COLOURS[expert]
    marked = marked and expert is not None
    edge, width = (RED, 2.0) if marked else (GREY, 0.4)
    axes.add_patch(
        Rectangle((x, y), 0.94, 0.35, facecolor=face, edgecolor=edge, linewidth=width,
                  zorder=3 if marked else 2)
    )  # fmt: skip


def _experts_along(axes: Axes) -> None:
    """Experts on the x axis, with a line between groups."""
    axes.set_xticks(range(EXPERTS))
    axes.set_xlabel("expert")
    axes.grid(False)
    for group in range(1, ROUTER.num_groups):
        axes.axvline(group * GROUP - 0.5, color=GREY, linewidth=0.6)
