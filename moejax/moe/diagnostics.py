"""A router's health, from the sums that routers report (``Routing.stats``). NumPy only."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

# An expert below this share of its fair load counts as dead.
DEAD_SHARE = 1 / 64


def stack_layers(router_stats: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "L ..."]]:
    """Statistics of all MoE layers, first layer first.

    Args:
      router_stats: ``Output.router_stats``, fetched: segment -> layer -> measure, each leaf with a
        leading axis of the segment's repeats.

    Returns:
      measure -> array with one row an MoE layer; empty for a dense model.
    """
    order = lambda names: sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))
    columns: dict[str, list[np.ndarray]] = {}
    for segment in order(router_stats):
        layers = [router_stats[segment][layer] for layer in order(router_stats[segment])]
        for name in layers[0] if layers else ():
            # (repeats, layers of the pattern, ...): repeats run slowest.
            values = np.stack([np.asarray(layer[name]) for layer in layers], axis=1)
            columns.setdefault(name, []).append(values.reshape(-1, *values.shape[2:]))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def max_violation(load: Float[np.ndarray, "*layers E"]) -> Float[np.ndarray, "*layers"]:
    """MaxVio = (max load - mean load) / mean load: 0 at balance, E / K - 1 at most.

    Source: loss-free balancing (arXiv 2408.15664, eq. 4). Zero where nothing was routed.
    """
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.maximum(mean, 1e-9) - 1, 0.0)


def load_entropy(load: Float[np.ndarray, "*layers E"]) -> Float[np.ndarray, "*layers"]:
    """Entropy of the load over its largest possible value, log E: 1 at balance."""
    share = load / np.maximum(load.sum(axis=-1, keepdims=True), 1e-9)
    terms = np.where(share > 0, share * np.log(np.maximum(share, 1e-30)), 0.0)
    return -terms.sum(axis=-1) / np.log(max(load.shape[-1], 2))


def router_health(router_stats: Mapping[str, Any]) -> dict[str, Any]:
    """What is logged of the routers: scalars over all MoE layers, and lists by layer.

    Returns:
      ``max_violation`` (mean over layers), ``max_violation_worst``, ``load_entropy``,
      ``gate_entropy`` (nats), ``top1_margin``, ``dropped_share`` (of all assignments),
      ``dead_experts`` (under 1/64 of the fair share, of all layers), ``squared_logsumexp``;
      of the exchange, means over valid tokens and layers: ``devices_per_token`` and
      ``nodes_per_token`` (devices along the mesh's ``expert`` axis, and machines, that hold a
      token's experts), ``bytes_sent_per_token`` (vectors sent to other devices and back in the
      forward pass: rows · D · bytes of a number · 2, without the padding of rounds), and as shares
      of all rows (tokens bound for a device, their own among them) ``exchange_overflow_share``
      (beyond the first round) and ``exchange_dropped_share`` (left out);
      by layer: ``max_violation_by_layer``, ``load_by_layer`` and ``gate_mass_by_layer`` (shares of
      each expert, 4 digits). Empty for a dense model.
    """
    stats = stack_layers(router_stats)
    if not stats:
        return {}
    load, tokens = stats["load"], np.maximum(stats["tokens"], 1)
    violation = max_violation(load)
    share = lambda values: np.round(
        values / np.maximum(values.sum(axis=-1, keepdims=True), 1e-9), 4
    ).tolist()
    fair = load.mean(axis=-1, keepdims=True)
    per_token = lambda name: float((stats[name] / tokens).mean())
    rows = max(stats["rows"].sum(), 1)
    return {
        "max_violation": float(violation.mean()),
        "max_violation_worst": float(violation.max()),
        "load_entropy": float(load_entropy(load).mean()),
        "gate_entropy": per_token("entropy"),
        "top1_margin": per_token("top1_margin"),
        "dropped_share": float(stats["dropped"].sum() / max(stats["assignments"].sum(), 1)),
        "dead_experts": int((load < DEAD_SHARE * fair).sum()),
        "squared_logsumexp": per_token("squared_logsumexp"),
        "devices_per_token": per_token("devices_touched"),
        "nodes_per_token": per_token("nodes_touched"),
        "bytes_sent_per_token": per_token("bytes_sent"),
        "exchange_overflow_share": float(stats["exchange_overflow"].sum() / rows),
        "exchange_dropped_share": float(stats["exchange_dropped"].sum() / rows),
        "max_violation_by_layer": np.round(violation, 4).tolist(),
        "load_by_layer": share(load),
        "gate_mass_by_layer": share(stats["gate_mass"]),
    }
