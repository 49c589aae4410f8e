"""Router health of an ablation's variants: MaxVio, in all and by layer, and dropped tokens."""

from typing import Any

import numpy as np

from moejax.analysis import statistics
from moejax.analysis.ablation_record import Record, is_number, mean_of, metric_values
from moejax.analysis.statistics import compare, mean_interval


def add_health(record: Record, budget: float, variants: dict[str, Any]) -> None:
    """Router health at the compared budget, with intervals, and differences to the reference."""
    reference = record.spec["reference"]
    for name, entry in variants.items():
        rows = record.completed(name, budget).values()
        health = entry["health"]
        health["dropped_share"] = mean_of([row.get("dropped_share") for row in rows])
        vio = [row["max_violation"] for row in rows if is_number(row.get("max_violation"))]
        layers = [row["max_violation_by_layer"] for row in rows
                  if row.get("max_violation_by_layer")]  # fmt: skip
        mean, _, interval = mean_interval(np.array(vio)) if vio else (None, None, None)
        health["max_violation"] = mean
        health["max_violation_interval"] = interval and list(interval)
        found = [mean_interval(layer) for layer in np.array(layers).T] if layers else None
        health["max_violation_by_layer"] = found and [mean for mean, *_ in found]
        health["max_violation_by_layer_interval"] = found and [
            interval and list(interval) for *_, interval in found
        ]
    values = metric_values(record, budget, "max_violation")
    _health_differences(values, reference, variants, "max_violation_difference")
    by_layer = {
        name: {
            seed: row["max_violation_by_layer"]
            for seed, row in record.completed(name, budget).items()
            if row.get("max_violation_by_layer")
        }
        for name in record.spec["variants"]
    }
    _layer_differences(by_layer, reference, variants)


def _health_differences(
    values: dict[str, dict[int, float]], reference: str, variants: dict[str, Any], key: str,
    alpha: float = statistics.ALPHA,
) -> None:  # fmt: skip
    """Differences of a measure of its own family, where the reference and another have it."""
    values = {name: found for name, found in values.items() if found}
    if reference not in values or len(values) < 2:
        return
    for name, found in compare(values, reference, alpha=alpha, power=None).differences.items():
        entry = {name: getattr(found, name) for name in ("mean", "p", "p_holm", "verdict")}
        entry["interval"] = found.interval and list(found.interval)
        variants[name]["health"][key] = entry


def _layer_differences(
    by_layer: dict[str, dict[int, list[float]]], reference: str, variants: dict[str, Any]
) -> None:
    """MaxVio by layer: Holm over the variants, Bonferroni over the layers.

    Only variants with as many layers of experts as the reference.
    """
    depth = {len(layers) for layers in by_layer[reference].values()}
    if len(depth) != 1:
        return
    depth = depth.pop()
    key, found = "max_violation_by_layer_difference", []
    same = {name: seeds for name, seeds in by_layer.items()
            if seeds and all(len(layers) == depth for layers in seeds.values())}  # fmt: skip
    for layer in range(depth):
        values = {name: {seed: layers[layer] for seed, layers in seeds.items()}
                  for name, seeds in same.items()}  # fmt: skip
        boxes = {name: {"health": {}} for name in same}
        _health_differences(values, reference, boxes, key, statistics.ALPHA / depth)
        found.append(boxes)
    for name in same:
        if name != reference:
            variants[name]["health"][key] = [boxes[name]["health"].get(key) for boxes in found]
