"""A router's health, from the sums that routers report (``Routing.stats``). NumPy only."""

from collections.abc import Mapping, Sequence
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
      Means over layers: ``max_violation`` (of this batch: MaxVio_batch of arXiv 2408.15664),
      ``load_entropy``, ``load_variation``, ``load_gini``, ``gate_entropy`` (nats),
      ``top1_margin``, ``squared_logsumexp``, ``experts_per_token`` (assignments over valid
      tokens), ``unrouted_share`` (valid tokens that no expert computes) and ``loss_NAME`` of each
      auxiliary loss, before its weight. Over all layers: ``max_violation_worst``,
      ``dropped_share`` (of all assignments) and ``dead_experts`` (under 1/64 of the fair share).
      By layer, ``NAME_by_layer`` to 4 digits: ``max_violation``, ``load_entropy``,
      ``load_variation``, ``gate_entropy``, ``dropped_share``, ``dead_experts``, and by expert as
      well, as shares, ``load`` and ``gate_mass``.
      Where routers keep a selection bias: ``bias_mean``, ``bias_spread`` (standard deviation over
      a layer's experts), and by layer ``bias_min``, ``bias_max``, ``bias_spread`` and ``bias``
      itself, all of them to 4 significant digits.
      Of the exchange, means over valid tokens and layers: ``devices_per_token`` and
      ``nodes_per_token`` (devices along the mesh's ``expert`` axis, and machines, that hold a
      token's experts), ``bytes_sent_per_token`` (vectors sent to other devices and back in the
      forward pass: rows · D · bytes of a number · 2, without the padding of rounds) and
      ``bytes_sent_out_per_token``, those of them to other machines, and as shares
      of all rows (tokens bound for a device, their own among them) ``exchange_overflow_share``
      (beyond the first round) and ``exchange_dropped_share`` (left out).
      Empty for a dense model.
    """
    stats = stack_layers(router_stats)
    if not stats:
        return {}
    bias = None if router_state is None else stack_bias(router_state)
    return {
        **_balance(stats),
        **_per_token(stats),
        **({} if bias is None else _bias(bias)),
        **_exchange(stats),
    }


def held_out_health(
    router_stats: Mapping[str, Any], loads: Sequence[Float[np.ndarray, "L E"]]
) -> dict[str, Any]:
    """What is logged of the routers with a validation.

    Args:
      router_stats: ``Output.router_stats``, summed over all held-out batches and fetched.
      loads: of each batch, as ``stack_layers`` gives them.

    Returns:
      MaxVio as arXiv 2408.15664 defines it, section 4.1: ``max_violation_global``, of the load over
      all held-out tokens, and ``max_violation_batch``, the mean of the batches' own, each a mean
      over layers and ``_by_layer``; and as in ``router_health`` the load's entropy and variation,
      dead experts, the dropped share and the gates' entropy, with their lists by layer, and
      ``load_by_layer``. Layers of MTP modules, which do not run, are not among them. Empty for a
      dense model.
    """
    stats = stack_layers(router_stats)
    if not stats:
        return {}
    batch = np.mean([max_violation(load) for load in loads], axis=0)
    whole = _balance(stats)
    violation = {
        "max_violation_global": whole["max_violation"],
        "max_violation_batch": float(batch.mean()),
        "max_violation_global_by_layer": whole["max_violation_by_layer"],
        "max_violation_batch_by_layer": _digits(batch),
    }
    kept = ("load_entropy", "load_variation", "dead_experts", "dropped_share")
    names = [*kept, *(f"{name}_by_layer" for name in kept), "load_by_layer"]
    entropy = stats["entropy"] / np.maximum(stats["tokens"], 1)
    gates = {"gate_entropy": float(entropy.mean()), "gate_entropy_by_layer": _digits(entropy)}
    return {**violation, **{name: whole[name] for name in names}, **gates}


def _balance(stats: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How even the load is, and what was dropped."""
    load = stats["load"]
    violation, dead = max_violation(load), dead_experts(load)
    entropy, variation = load_entropy(load), load_variation(load)
    dropped, assigned = stats["dropped"], stats["assignments"]
    return {
        "max_violation": float(violation.mean()),
        "max_violation_worst": float(violation.max()),
        "load_entropy": float(entropy.mean()),
        "load_variation": float(variation.mean()),
        "load_gini": float(load_gini(load).mean()),
        "dropped_share": float(dropped.sum() / max(assigned.sum(), 1)),
        "dead_experts": int(dead.sum()),
        "max_violation_by_layer": _digits(violation),
        "load_entropy_by_layer": _digits(entropy),
        "load_variation_by_layer": _digits(variation),
        "dropped_share_by_layer": _digits(dropped / np.maximum(assigned, 1)),
        "dead_experts_by_layer": dead.tolist(),
        "load_by_layer": _shares(load),
        "gate_mass_by_layer": _shares(stats["gate_mass"]),
    }


def _per_token(stats: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means over valid tokens."""
    tokens = np.maximum(stats["tokens"], 1)
    names = {
        "gate_entropy": "entropy", "top1_margin": "top1_margin",
        "squared_logsumexp": "squared_logsumexp", "experts_per_token": "assignments",
        "unrouted_share": "unrouted",
        **{name: name for name in sorted(stats) if name.startswith("loss_")},
        "devices_per_token": "devices_touched", "nodes_per_token": "nodes_touched",
        "bytes_sent_per_token": "bytes_sent", "bytes_sent_out_per_token": "bytes_sent_out",
    }  # fmt: skip
    means = {name: float((stats[source] / tokens).mean()) for name, source in names.items()}
    return {**means, "gate_entropy_by_layer": _digits(stats["entropy"] / tokens)}


def _exchange(stats: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Rows beyond the exchange's first round."""
    rows = max(stats["rows"].sum(), 1)
    return {
        "exchange_overflow_share": float(stats["exchange_overflow"].sum() / rows),
        "exchange_dropped_share": float(stats["exchange_dropped"].sum() / rows),
    }


def _bias(bias: Float[np.ndarray, "L N"]) -> dict[str, Any]:
    spread = bias.std(axis=-1)
    by_layer = {
        "bias_min": bias.min(axis=-1), "bias_max": bias.max(axis=-1), "bias_spread": spread,
        "bias": bias,
    }  # fmt: skip
    return {
        "bias_mean": float(bias.mean()),
        "bias_spread": float(spread.mean()),
        **{f"{name}_by_layer": _significant(values) for name, values in by_layer.items()},
    }


def _digits(values: Float[np.ndarray, "..."]) -> list:
    """To 4 digits; in float64, so that they are written short."""
    return np.round(values.astype(np.float64), 4).tolist()


def _shares(values: Float[np.ndarray, "L E"]) -> list:
    return _digits(values / np.maximum(values.sum(axis=-1, keepdims=True), 1e-9))


def _significant(values: Float[np.ndarray, "..."]) -> list:
    """To 4 significant digits: a bias may move by steps of any size."""
    return np.vectorize(lambda value: float(f"{value:.4g}"), otypes=[float])(values).tolist()
