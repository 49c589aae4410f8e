"""Recorded results in a notebook: an ablation where it has been run, or the command that runs it.

``MOEJAX_ABLATIONS`` is the folder that holds them (``../experiments/results/ablations``, as seen
from the notebooks' folder, unless set).
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from moejax.analysis.ablation import analyse, format_analysis
from moejax.analysis.ablation_text import compared_budget
from moejax.analysis.figures import BLUE, GREEN, GREY, RED, panel
from moejax.analysis.statistics import BETTER, WORSE
from moejax.config import UserError

ABLATIONS = "MOEJAX_ABLATIONS"
RESULTS = pathlib.Path("..", "experiments", "results")
_COLOURS = {BETTER: GREEN, WORSE: RED}


def folder(name: str) -> pathlib.Path:
    """Where an ablation of ``experiments/ablations`` is recorded."""
    return pathlib.Path(os.environ.get(ABLATIONS) or RESULTS / "ablations") / name


def ablation(name: str) -> dict[str, Any] | None:
    """An ablation's analysis; None where it has not been run here.

    ``analysis.json`` is read where there is one, else the record is analysed.

    Raises:
      UserError: a record that is damaged.
    """
    path = folder(name)
    try:
        return json.loads((path / "analysis.json").read_text())
    except FileNotFoundError:
        return analyse(path) if (path / "results.jsonl").exists() else None
    except ValueError as error:
        raise UserError(
            f"{path / 'analysis.json'} is damaged ({error}); delete it, and the record is analysed"
        ) from None


def command(name: str) -> str:
    """What makes the record, from the checkout's top folder."""
    return (
        f"moejax ablate --config=experiments/ablations/{name}.py "
        f"--workdir=experiments/results/ablations/{name}"
    )


def show(name: str, found: Mapping[str, Any] | None) -> str:
    """The analysis as text; without one, what to run."""
    if found is None:
        return f"{name} is not recorded yet. What it costs and then the record:\n{command(name)}"
    return format_analysis(found)


def plot_verdicts(found: Mapping[str, Any] | None) -> Figure | None:
    """Each variant's difference to the reference with its interval, and balance beside loss.

    Args:
      found: an ablation's analysis; None draws nothing.
    """
    if found is None:
        return None
    told = {name: entry["difference"] for name, entry in found["variants"].items()}
    told = {name: one for name, one in told.items() if one and one["mean"] is not None}
    names = sorted(told, key=lambda name: told[name]["mean"])
    figure, (left, right) = panel(10.0, 1.4 + min(0.26 * len(names), 6.0), columns=2)
    for place, name in enumerate(names):
        one = told[name]
        low, high = one["interval"] or (one["mean"], one["mean"])
        colour = _COLOURS.get(one["verdict"], GREY)
        left.plot([low, high], [place, place], color=colour, linewidth=1.5)
        left.plot(one["mean"], place, "o", color=colour, markersize=4)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.invert_yaxis()
    left.set_xlabel(f"{found['metric']} less {found['reference']}'s (green: better, red: worse)")
    _balance(right, found)
    return figure


def _balance(axes, found: Mapping[str, Any]) -> None:
    """Loss over MaxVio, a point a variant, at the budget of the verdicts."""
    budget = compared_budget(found)
    for name, entry in found["variants"].items():
        mean = next(p["mean"] for p in entry["by_budget"] if p["budget"] == budget)
        violation = (entry["health"] or {}).get("max_violation")
        if mean is None or violation is None:
            continue
        axes.plot(violation, mean, "o", color=RED if name == found["reference"] else BLUE)
        axes.annotate(name, (violation, mean), (3, 3), textcoords="offset points", fontsize=6)
    axes.set(xlabel="MaxVio", ylabel=found["metric"])


def router_costs(experts: int = 64) -> dict[str, tuple[float, bool]]:
    """Time of each router over that of the experts' block, forward and backward, on two CPU cores.

    From ``experiments/results/routers/speed_cpu``.

    Args:
      experts: E of the shape.

    Returns:
      By router: the share, and whether it leaks later tokens into earlier ones.
    """
    path = RESULTS / "routers" / "speed_cpu" / "results.json"
    rows = json.loads(path.read_text())["results"]
    return {
        row["dispatch"]: (row["share_of_experts"], "leaks" in row["needs"])
        for row in rows
        if row["shape"]["E"] == experts and not row["dispatch"].startswith("experts")
    }


def plot_router_costs(experts: int = 64) -> Figure:
    """``router_costs`` from the cheapest to the dearest; those that leak in grey."""
    costs = sorted(router_costs(experts).items(), key=lambda item: item[1][0])
    figure, (axes,) = panel(6.4, 0.8 + 0.13 * len(costs))
    colours = [GREY if leaks else BLUE for _, (_, leaks) in costs]
    axes.barh(range(len(costs)), [100 * share for _, (share, _) in costs], color=colours)
    axes.set_yticks(range(len(costs)), [name for name, _ in costs], fontsize=6)
    axes.set(xscale="log", xlabel="% of the experts' time (grey: leaks, for encoders)")
    return figure
