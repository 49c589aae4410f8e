"""Loss over what an ablation varies: a power law along each axis on which its variants differ."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.analysis.ablation_record import Record, is_number, mean_of, metric_values
from moejax.analysis.scaling_fits import fit
from moejax.config import ConfigError

LEAST_VARIANTS, LEAST_RATIO = 5, 1.2
_SIZES = {"active_params": "active", "total_params": "total"}  # as the plan's rates name them


def variant_fits(record: Record, budget: float) -> dict[str, Any]:
    """The means of the variants at a budget over each axis along which they differ.

    Axes are ``active_params`` and ``total_params``, and every field that variants edit to a number;
    those that do not edit it have the base's, or are left out where it does not say. An axis needs
    five variants and a factor of 1.2 between its ends. Other fields may differ along it too, so
    that it describes the variants and not the axis alone. The form is L = c + a / x^alpha: where
    its ``left_out_error`` is not below ``constant_error``, the loss was not shown to follow it.

    Returns:
      By axis: ``scaling_fits.Fit.to_dict``, and ``data``, [value, loss] of each variant by name; or
      ``why`` there is no fit.
    """
    means = {name: mean_of(list(by_seed.values()))
             for name, by_seed in metric_values(record, budget).items()}  # fmt: skip
    fits = {}
    for axis, values in _axes(record).items():
        data = {name: [value, means[name]] for name, value in values.items()
                if means[name] is not None}  # fmt: skip
        along = [value for value, _ in data.values()]
        if len(data) < LEAST_VARIANTS or max(along) < LEAST_RATIO * min(along):
            continue
        points = np.array(list(data.values()))
        try:
            found = fit("power_law", {axis: points[:, 0]}, points[:, 1]).to_dict()
        except ConfigError as error:
            found = {"why": str(error)}
        fits[axis] = {**found, "data": data}
    return fits


def _axes(record: Record) -> dict[str, dict[str, float]]:
    """Axis -> variant -> value, numbers above zero."""
    axes: dict[str, dict[str, float]] = {axis: {} for axis in _SIZES}
    rates, variants = record.plan.get("rates") or {}, record.spec["variants"]
    edited = {field for edits in variants.values() for field in edits}
    inherited = {field: _value(record.spec.get("base"), field) for field in edited}
    for name, edits in variants.items():
        model = (rates.get(name) or {}).get("model") or {}
        sizes = {axis: model.get(field) for axis, field in _SIZES.items()}
        found = sizes | inherited | dict(edits)
        for axis, value in found.items():
            if is_number(value) and value > 0:
                axes.setdefault(axis, {})[name] = float(value)
    return axes


def _value(blocks: Any, field: str) -> Any:
    """A dotted field of nested blocks; None where they do not have it."""
    for name in field.split("."):
        blocks = blocks.get(name) if isinstance(blocks, Mapping) else None
    return blocks
