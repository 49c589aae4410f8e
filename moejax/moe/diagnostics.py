"""A router's health, from the sums that routers report (``Routing.stats``). NumPy only."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

# An expert below this share of its fair load counts as dead.
DEAD_SHARE = 1 / 64


def stack_layers(router_stats: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "L ..."]]:
    """Statistics of all MoE layers, first layer first, MTP modules' last.

    Args:
      router_stats: ``Output.router_stats``, fetched: segment -> layer -> measure, each leaf with a
        leading axis of the segment's repeats.

    Returns:
      measure -> array with one row an MoE layer; empty for a dense model.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for segment in sorted(router_stats, key=_place):
        layers = [
            router_stats[segment][layer] for layer in sorted(router_stats[segment], key=_place)
        ]
        for name in layers[0] if layers else ():
            # (repeats, layers of the pattern, ...): repeats run slowest.
            values = np.stack([np.asarray(layer[name]) for layer in layers], axis=1)
            columns.setdefault(name, []).append(values.reshape(-1, *values.shape[2:]))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _place(name: str) -> tuple[bool, int]:
    """Where ``segment_2`` or ``layer_1`` stands, or ``mtp_0_layer``: after the segments."""
    return name.startswith("mtp_"), int(name.split("_")[1])


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


def load_variation(load: Float[np.ndarray, "*layers E"]) -> Float[np.ndarray, "*layers"]:
    """Coefficient of variation, standard deviation over mean: 0 at balance, sqrt(E - 1) at most.

    Its square is Shazeer et al.'s balance measure (arXiv 1701.06538, eq. 7 and 11). Zero where
    nothing was routed.
    """
    return load.std(axis=-1) / np.maximum(load.mean(axis=-1), 1e-9)


def load_gini(load: Float[np.ndarray, "*layers E"]) -> Float[np.ndarray, "*layers"]:
    """Gini coefficient, sum_ij |c_i - c_j| / (2 E sum_i c_i): 0 at balance, 1 - 1 / E at most.

    Source: Gini (1912), by the sorted form sum_i (2 i - E - 1) c_(i) / (E sum_i c_i), i from 1.
    Zero where nothing was routed.
    """
    count = load.shape[-1]
    weights = 2 * np.arange(1, count + 1) - count - 1
    total = (np.sort(load, axis=-1) * weights).sum(axis=-1)
    return total / np.maximum(count * load.sum(axis=-1), 1e-9)


def dead_experts(load: Float[np.ndarray, "*layers E"]) -> Int[np.ndarray, "*layers"]:
    """Experts under 1/64 of their fair share of the load."""
    fair = load.mean(axis=-1, keepdims=True)
    return (load < DEAD_SHARE * fair).sum(axis=-1)


def stack_bias(router_state: Mapping[str, Any]) -> Float[np.ndarray, "L N"] | None:
    """The selection biases of all MoE layers, first layer first; None where routers keep none.

    Args:
      router_state: the collection ``router_state``, fetched: segment -> layer -> moe -> router ->
        variable, each leaf with a leading axis of the segment's repeats.
    """
    states = {
        segment: {layer: state["moe"]["router"] for layer, state in layers.items()}
        for segment, layers in router_state.items()
    }
    kept = [state for layers in states.values() for state in layers.values()]
    if not kept or not all("bias" in state for state in kept):
        return None
    return stack_layers(states)["bias"]


def router_health(
    router_stats: Mapping[str, Any], router_state: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What is logged of the routers: scalars over all MoE layers, and lists by layer.

    Args:
      router_stats: ``Output.router_stats``, summed over a batch and fetched.
      router_state: the collection ``router_state``, fetched, for the selection bias; None leaves
        the bias out.

    Returns:
      ``max_violation`` (mean over layers), ``max_violation_worst``, ``load_entropy``,
      ``load_variation``, ``load_gini``, ``gate_entropy`` (nats), ``top1_margin``,
      ``dropped_share`` (of all assignments), ``dead_experts`` (under 1/64 of the fair share, of all
      layers), ``squared_logsumexp``; ``experts_per_token`` (assignments over valid tokens) and
      ``unrouted_share`` (valid tokens that no expert computes); ``loss_NAME`` of each auxiliary
      loss, before its weight; ``bias_mean`` and ``bias_spread`` (standard deviation over a layer's
      experts) where routers keep a selection bias;
      of the exchange, means over valid tokens and layers: ``devices_per_token`` and
      ``nodes_per_token`` (devices along the mesh's ``expert`` axis, and machines, that hold a
      token's experts), ``bytes_sent_per_token`` (vectors sent to other devices and back in the
      forward pass: rows · D · bytes of a number · 2, without the padding of rounds) and
      ``bytes_sent_out_per_token``, those of them to other machines, and as shares
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
    per_token = lambda name: float((stats[name] / tokens).mean())
    rows = max(stats["rows"].sum(), 1)
    return {
        "max_violation": float(violation.mean()),
        "max_violation_worst": float(violation.max()),
        "load_entropy": float(load_entropy(load).mean()),
        "load_variation": float(load_variation(load).mean()),
        "load_gini": float(load_gini(load).mean()),
        "gate_entropy": per_token("entropy"),
        "top1_margin": per_token("top1_margin"),
        "dropped_share": float(stats["dropped"].sum() / max(stats["assignments"].sum(), 1)),
        "dead_experts": int(dead_experts(load).sum()),
        "squared_logsumexp": per_token("squared_logsumexp"),
        "experts_per_token": per_token("assignments"),
        "unrouted_share": per_token("unrouted"),
        **{name: per_token(name) for name in sorted(stats) if name.startswith("loss_")},
        **_bias(router_state),
        "devices_per_token": per_token("devices_touched"),
        "nodes_per_token": per_token("nodes_touched"),
        "bytes_sent_per_token": per_token("bytes_sent"),
        "bytes_sent_out_per_token": per_token("bytes_sent_out"),
        "exchange_overflow_share": float(stats["exchange_overflow"].sum() / rows),
        "exchange_dropped_share": float(stats["exchange_dropped"].sum() / rows),
        "max_violation_by_layer": np.round(violation, 4).tolist(),
        "load_by_layer": share(load),
        "gate_mass_by_layer": share(stats["gate_mass"]),
    }


def _bias(router_state: Mapping[str, Any] | None) -> dict[str, float]:
    bias = None if router_state is None else stack_bias(router_state)
    if bias is None:
        return {}
    return {"bias_mean": float(bias.mean()), "bias_spread": float(bias.std(axis=-1).mean())}
