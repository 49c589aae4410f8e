"""Figures of routers: what a run logged of them, and what ``moejax inspect`` measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.analysis import measure
from moejax.analysis.report.charts import Chart, HeatMap, Line, LineChart, tick_label, ticks
from moejax.analysis.report.curves import AXES
from moejax.analysis.report.gather import RunRecord

MOST_LAYERS = 8  # drawn one by one; of more, evenly spaced ones
MOST_EXPERTS = 32  # whose bias is drawn as a curve
COLUMNS = 120  # of a heat map over time


def over_time(run: RunRecord) -> list[Chart]:
    """MaxVio, load, selection bias and drops by layer over the run; empty for a dense model."""
    if not run.config.model.layers("moe"):
        return []
    layers = measure.moe_layers(run.config.model)
    return [
        *_balance_charts(run, layers),
        *_health_charts(run),
        *_bias_charts(run, layers),
        *_load_charts(run, layers),
    ]


def shown(number: int) -> list[int]:
    """Which of so many layers are drawn."""
    if number <= MOST_LAYERS:
        return list(range(number))
    return np.unique(np.linspace(0, number - 1, MOST_LAYERS).round().astype(int)).tolist()


def _name(layers: Sequence[int], i: int) -> str:
    return f"layer {layers[i]}" if i < len(layers) else f"layer no. {i}"


def _balance_charts(run: RunRecord, layers: Sequence[int]) -> list[Chart]:
    steps, values = run.curves.series("router/max_violation_by_layer")
    if not len(steps):
        return []
    x = run.curves.at("tokens", steps)
    told = "(largest load - mean load) / mean load of a batch; 0 is perfect balance."
    if values.shape[1] > MOST_LAYERS:
        top = max(float(np.quantile(values, 0.99)), 1e-3)
        names = [str(layer) for layer in layers]
        return [_time_map("max-violation", "MaxVio by layer", told, x, values.T, names, "layer",
                          "sequential", top)]  # fmt: skip
    lines = [Line(_name(layers, i), x, values[:, i], None, i) for i in range(values.shape[1])]
    charts: list[Chart] = [LineChart("max-violation", "MaxVio by layer", told, AXES["tokens"],
                                     "MaxVio of a batch", lines, zero=True)]  # fmt: skip
    return charts + _global_charts(run, layers)


def _global_charts(run: RunRecord, layers: Sequence[int]) -> list[Chart]:
    """MaxVio over the whole held-out text, where validations logged it."""
    field = "val/router/max_violation_global_by_layer"
    rows = [row for row in run.curves.validation if row.get(field) is not None]
    if not rows:
        return []
    x = run.curves.at("tokens", [row["step"] for row in rows])
    values = np.array([row[field] for row in rows], float)
    lines = [Line(_name(layers, i), x, values[:, i], None, i, "points")
             for i in shown(values.shape[1])]  # fmt: skip
    told = "Of the load over the held-out text of each validation together."
    return [LineChart("max-violation-global", "MaxVio of held-out text by layer", told,
                      AXES["tokens"], "MaxVio", lines, zero=True)]  # fmt: skip


def _health_charts(run: RunRecord) -> list[Chart]:
    shares = (
        ("router/load_entropy", "load entropy, 1 is even"),
        ("router/dropped_share", "dropped assignments"),
        ("router/unrouted_share", "unrouted tokens"),
    )
    lines = []
    for number, (field, label) in enumerate(shares):
        steps, values = run.curves.series(field)
        if len(steps) and (number == 0 or values.any()):
            lines.append(Line(label, run.curves.at("tokens", steps), values, None, number))
    charts: list[Chart] = []
    if lines:
        none = [label for (_, label), line in zip(shares[1:], (1, 2), strict=True)
                if all(kept.colour != line for kept in lines)]  # fmt: skip
        told = f"Shares, means over layers. No {' and no '.join(none)}." if none else "Shares."
        several = len(lines) > 1
        charts.append(LineChart("router-health", "Load entropy and drops", told, AXES["tokens"],
                                "share" if several else lines[0].label, lines,
                                zero=several))  # fmt: skip
    steps, dead = run.curves.series("router/dead_experts")
    if len(steps) and dead.any():
        line = Line("", run.curves.at("tokens", steps), dead, None, 1)
        charts.append(LineChart("dead-experts", "Dead experts", "Under 1/64 of their fair share, "
                                "all layers together.", AXES["tokens"], "experts", [line],
                                zero=True))  # fmt: skip
    return charts


def _bias_charts(run: RunRecord, layers: Sequence[int]) -> list[Chart]:
    steps, values = run.curves.series("router/bias_by_layer")
    if not len(steps):
        steps, values = run.curves.series("router/bias_spread")
        if not len(steps) or not values.any():
            return []
        line = Line("", run.curves.at("tokens", steps), values, None, 0)
        return [LineChart("bias-spread", "Spread of the selection bias", "Standard deviation over "
                          "a layer's experts, mean over layers.", AXES["tokens"], "bias", [line],
                          zero=True)]  # fmt: skip
    every = max(1, len(steps) // COLUMNS)
    x, values = run.curves.at("tokens", steps)[::every], values[::every]
    experts = np.unique(np.linspace(0, values.shape[2] - 1, min(values.shape[2], MOST_EXPERTS))
                        .round().astype(int))  # fmt: skip
    some = (
        f" {len(experts)} of {values.shape[2]} experts." if len(experts) < values.shape[2] else ""
    )
    return [
        LineChart(
            f"bias-layer-{layers[i]}", f"Selection bias, {_name(layers, i)}",
            f"One curve an expert; only differences between them select.{some}", AXES["tokens"],
            "bias", [Line("", x, values[:, i, e], None, int(e)) for e in experts],
        )
        for i in shown(values.shape[1])
    ]  # fmt: skip


def _load_charts(run: RunRecord, layers: Sequence[int]) -> list[Chart]:
    steps, values = run.curves.series("router/load_by_layer")
    if not len(steps):
        return []
    x, experts = run.curves.at("tokens", steps), values.shape[2]
    told = "Each expert's load over its fair share: 1 is even, 0 is unused."
    return [
        _time_map(f"load-layer-{layers[i]}", f"Load over time, {_name(layers, i)}", told, x,
                  values[:, i].T * experts, [str(e) for e in range(experts)], "expert",
                  "diverging", 2.0)
        for i in shown(values.shape[1])
    ]  # fmt: skip


def _time_map(name, title, told, x, values, rows, y_label, scale, top) -> HeatMap:
    """A heat map over evenly spaced amounts of tokens: the nearest logged step before each."""
    edges = np.linspace(x[0], x[-1], min(COLUMNS, len(x)))
    places = np.clip(np.searchsorted(x, edges, side="right") - 1, 0, len(x) - 1)
    span = x[-1] - x[0] or 1.0
    found = ticks(x[0], x[0] + span, 4)
    gap = found[1] - found[0] if len(found) > 1 else span
    columns = [((at - x[0]) / span, tick_label(at, gap)) for at in found]
    return HeatMap(name, title, told, values[:, places], rows, columns, AXES["tokens"], y_label,
                   scale, top)  # fmt: skip


def inspected(result: Mapping[str, Any], prefix: str = "") -> list[Chart]:
    """The figures of an inspection, from what its ``inspect.json`` holds.

    Args:
      result: what ``moejax.analysis.inspect.inspect`` returns.
      prefix: of the figures' names, where a report holds several inspections.
    """
    made = [_load_maps, _saturation, _coactivation, _domains, _vocabulary, _masked]
    charts = [chart for make in made for chart in make(result)]
    rename = lambda chart: type(chart)(**{**vars(chart), "name": f"{prefix}{chart.name}"})
    return [rename(chart) for chart in charts] if prefix else charts


def _load_maps(result: Mapping[str, Any]) -> list[Chart]:
    experts = result["num_experts"]
    layers = [str(layer) for layer in result["layers"]]
    names = [str(e) for e in range(experts)]
    told = {
        "load": ("Load by layer and expert", "Share of the assignments, over a fair share."),
        "gate_mass": (
            "Gate mass by layer and expert",
            "Share of the gates' sum, over a fair share. Much load and little gate mass: tokens "
            "that balancing forces on an expert.",
        ),
    }
    return [
        HeatMap(f"inspect-{name.replace('_', '-')}", title, caption,
                _matrix(result[name]) * experts, layers, names, "expert", "layer", "diverging", 2.0)
        for name, (title, caption) in told.items()
    ]  # fmt: skip


def _matrix(values: Any) -> np.ndarray:
    return np.array(values, float)  # None becomes nan


def _saturation(result: Mapping[str, Any]) -> list[Chart]:
    saturation, flips = result["saturation"], result["flip_rate"]
    if saturation is None:
        return []
    chance = float(np.mean(result["by_layer"]["experts_per_token"]) / result["num_experts"])
    made = []
    for name, title, steps, values, told, lines in (
        ("saturation", "Router saturation", saturation["steps"], saturation["by_layer"],
         f"Share of a token's experts at step {saturation['reference']} that it has already.",
         [("chance", chance)]),
        ("flips", "Changed routing", [after for _, after in flips["steps"]], flips["by_layer"],
         "Share of the tokens whose set of experts is not that of the checkpoint before.", []),
    ):  # fmt: skip
        values = _matrix(values)
        x = np.array(steps, float)
        made.append(LineChart(
            f"inspect-{name}", title, told, "step", "share of tokens",
            [Line(f"layer {result['layers'][i]}", x, values[:, i], None, i, "points")
             for i in shown(values.shape[1])], lines, zero=True, whole=True,
        ))  # fmt: skip
    return made


def _coactivation(result: Mapping[str, Any]) -> list[Chart]:
    if result.get("coactivation") is None:
        return []
    layers = [_matrix(layer) for layer in result["coactivation"]]
    for layer in layers:
        np.fill_diagonal(layer, np.nan)
    known = [layer[np.isfinite(layer)].max() for layer in layers if np.isfinite(layer).any()]
    top = float(max(known, default=0.0)) or 1.0
    names = [str(e) for e in range(result["num_experts"])]
    told = "Of the tokens of the row's expert, the share that the column's computes too."
    return [
        HeatMap(f"inspect-coactivation-{result['layers'][i]}",
                f"Co-activation, layer {result['layers'][i]}", told, layers[i], names, names,
                "expert", "expert", "sequential", top)
        for i in shown(len(layers))
    ]  # fmt: skip


def _domains(result: Mapping[str, Any]) -> list[Chart]:
    domains = result["domains"]
    if domains is None:
        return []
    fair = max(float(np.mean(result["by_layer"]["experts_per_token"])), 1e-9)
    experts = result["num_experts"]
    told = f"Share of a domain's tokens ({domains['kind']}) at each expert, over the mean expert's."
    return [
        HeatMap(f"inspect-domains-{result['layers'][i]}",
                f"Domains, layer {result['layers'][i]}", told,
                _matrix(domains["share"][i]).T * experts / fair, domains["names"],
                [str(e) for e in range(experts)], "expert", "domain", "diverging", 2.0)
        for i in shown(len(domains["share"]))
    ]  # fmt: skip


def _vocabulary(result: Mapping[str, Any]) -> list[Chart]:
    if result.get("vocabulary") is None:
        return []
    x = np.array(result["layers"], float)
    lines = [
        Line(view, x, _matrix(result["by_layer"][f"vocabulary_{view}"]), None, i, "points")
        for i, view in enumerate(measure.VIEWS)
    ]
    told = "How far a token's id alone settles its experts: 1 is wholly."
    return [LineChart("inspect-vocabulary", "Specialisation by token id", told, "layer", "share",
                      lines, zero=True, whole=True)]  # fmt: skip


def _masked(result: Mapping[str, Any]) -> list[Chart]:
    curve = result["masked_best_experts"]
    if curve is None:
        return []
    line = Line("", _matrix(curve["masked"]), _matrix(curve["loss"]), None, 1, "points")
    told = "Held-out loss with each token's best experts out of reach: steep is specialised."
    return [LineChart("inspect-masked", "Loss without the best experts", told,
                      f"experts masked, of {result['num_experts']}", "nats per token",
                      [line], whole=True)]  # fmt: skip
