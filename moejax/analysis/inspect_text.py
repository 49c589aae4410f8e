"""``moejax inspect`` on a terminal: tables by layer, from what its ``inspect.json`` holds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.cost.text import columns

# Heading of a measure by layer in the tables, and how its numbers are written.
LOAD = {
    "max_violation_batch": ("MaxVio", ".2f"),
    "max_violation_global": ("global", ".2f"),
    "load_variation": ("CV", ".2f"),
    "load_gini": ("Gini", ".2f"),
    "load_entropy": ("entropy", ".3f"),
    "dead_experts": ("dead", "d"),
    "experts_per_token": ("experts", ".2f"),
    "unrouted_share": ("unrouted", ".1%"),
    "dropped_share": ("dropped", ".1%"),
}
ROUTER = {
    "gate_entropy": ("entropy", ".2f"),
    "top1_margin": ("margin", ".3f"),
    "squared_logsumexp": ("lse²", ".3g"),
    "bias_mean": ("bias mean", ".2g"),
    "bias_spread": ("spread", ".2g"),
    "router_gradient_norm": ("grad", ".2g"),
    "router_gradient_norm_auxiliary": ("grad aux", ".2g"),
    "output_redundancy": ("likeness", ".3f"),
    "vocabulary_input": ("by input", ".2f"),
    "vocabulary_target": ("target", ".2f"),
    "vocabulary_prediction": ("predicted", ".2f"),
}
MOST_EXPERTS, MOST_TOKENS = 3, 5


def format_inspection(result: Mapping[str, Any]) -> str:
    """The tables and where the figures are, as text for people.

    Args:
      result: what ``moejax.analysis.inspect.inspect`` returns.
    """
    parts = [
        f"router {result['router']}, {result['num_experts']} experts, {result['top_k']} chosen; "
        f"checkpoint of step {result['step']}, {result['tokens']:,} held-out tokens, "
        f"{result['loss']:.4f} nats/token",
        "\nload\n" + _table(result, LOAD),
        "\nrouter and experts\n" + _table(result, ROUTER),
        _over_steps(result),
        masked_text(result),
        domains_text(result),
        tokens_text(result),
        *(f"left out    {name}: {why}" for name, why in result["left_out"].items()),
        f"\n{result['output']}   {', '.join(result['files'])}",
    ]
    return "\n".join(part for part in parts if part)


def _table(result: Mapping[str, Any], measures: Mapping[str, tuple[str, str]]) -> str:
    own = {name: shown for name, shown in measures.items() if name in result["by_layer"]}
    losses = [name for name in result["by_layer"] if name.startswith("loss_")]
    if measures is ROUTER:
        own |= {name: (name.replace("_", " "), ".3g") for name in losses}
    rows = [["layer", *(heading for heading, _ in own.values())]]
    for i, layer in enumerate(result["layers"]):
        values = [(result["by_layer"][name][i], form) for name, (_, form) in own.items()]
        rows.append([str(layer), *("-" if v is None else format(v, f) for v, f in values)])
    return columns(rows)


def _over_steps(result: Mapping[str, Any]) -> str:
    saturation, flips = result["saturation"], result["flip_rate"]
    if saturation is None:
        return ""
    changed = dict(zip([after for _, after in flips["steps"]], flips["by_layer"], strict=True))
    layers = [f"layer {layer}" for layer in result["layers"]]
    head = ["step", *layers, *(f"flips {layer}" for layer in result["layers"])]
    rows = [head]
    for step, shares in zip(saturation["steps"], saturation["by_layer"], strict=True):
        flipped = changed.get(step, [None] * len(layers))
        rows.append([str(step), *(_percent(value) for value in [*shares, *flipped])])
    return (
        f"\noverlap with the experts at step {saturation['reference']} (saturation), and tokens "
        "whose experts changed\n" + columns(rows)
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def masked_text(result: Mapping[str, Any]) -> str:
    """The loss over how many of each token's best experts are masked; empty if not measured."""
    curve = result["masked_best_experts"]
    if curve is None:
        return ""
    rows = [["masked", *map(str, curve["masked"])]]
    rows.append(["nats/token", *(f"{loss:.4f}" for loss in curve["loss"])])
    rows.append(["experts", *(f"{count:.2f}" for count in curve["experts_per_token"])])
    return "\nloss with each token's best experts masked\n" + columns(rows)


def domains_text(result: Mapping[str, Any]) -> str:
    """Of each domain, the expert that takes the most, over the mean one; empty if not measured."""
    domains = result["domains"]
    if domains is None:
        return ""
    fair = np.mean(result["by_layer"]["experts_per_token"]) / result["num_experts"]
    ratio = np.array(domains["share"]) / max(fair, 1e-9)
    rows = [["domain", "tokens", *(f"layer {layer}" for layer in result["layers"])]]
    for i, (name, tokens) in enumerate(zip(domains["names"], domains["tokens"], strict=True)):
        best = [f"{layer[:, i].max():.1f}x at {layer[:, i].argmax()}" for layer in ratio]
        rows.append([name, f"{tokens:,}", *best])
    title = f"domains by {domains['kind']}: the expert that takes most of each, over the mean one"
    return f"\n{title}\n{columns(rows)}"


def tokens_text(result: Mapping[str, Any]) -> str:
    """Of each layer, the experts that are surest of their tokens; empty where not measured."""
    vocabulary = result["vocabulary"]
    if vocabulary is None:
        return ""
    rows = [["layer", "expert", "input tokens and the share of their occurrences"]]
    for layer, experts in zip(result["layers"], vocabulary["input"], strict=True):
        sure = lambda i, experts=experts: -np.mean([s for _, s, _ in experts[i]] or [0.0])
        for i in sorted(range(len(experts)), key=sure)[:MOST_EXPERTS]:
            tokens = [f"{text!r} {share:.0%}" for text, share, _ in experts[i][:MOST_TOKENS]]
            rows.append([str(layer), str(i), "  ".join(tokens)])
    return "\ntokens of experts\n" + columns(rows, left=3)
