"""Pipelines of ``experiments/r1`` as tables and figures: a run's folder, or the record of one.

A record has the run's layout and less of it: ``pipeline.json``, and ``metrics.jsonl`` in folders of
the stages whose curves are shown.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moejax.analysis import bills
from moejax.analysis.figures import BLUE, GREEN, GREY, RED, panel, plain
from moejax.analysis.recorded import RESULTS
from moejax.analysis.statistics import Difference, compare
from moejax.config import UserError
from moejax.cost import text

R1 = RESULTS / "r1"  # as seen from the notebooks' folder
Stages = dict[str, dict[str, Any]]


def read(folder: str | pathlib.Path) -> Stages:
    """The summary of each stage that a pipeline ran, by name, in order.

    Its ``seconds`` are of all processes that worked on the stage, where the record has them;
    ``last_seconds`` of the last one.

    Raises:
      UserError: no pipeline is there, or its record is damaged.
    """
    path = pathlib.Path(folder) / "pipeline.json"
    try:
        stages = json.loads(path.read_text())["stages"]
        return {entry["name"]: _summary(entry) for entry in stages}
    except FileNotFoundError:
        raise UserError(
            f"{path}: no pipeline is recorded there; give a pipeline's folder"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run the pipeline again") from None


def _summary(entry: Mapping[str, Any]) -> dict[str, Any]:
    last = entry["summary"]["seconds"]
    return {**entry["summary"], "seconds": entry.get("seconds", last), "last_seconds": last}


def _stage(stages: Stages, name: str) -> dict[str, Any]:
    """A stage's summary; raises UserError where there is none."""
    if name not in stages:
        raise UserError(f"{name}: is no stage of this pipeline; known: {', '.join(stages)}")
    return stages[name]


def read_seeds(folder: str | pathlib.Path) -> list[Stages]:
    """The pipelines of ``folder``'s ``seed0``, ``seed1`` and so on, in order.

    Raises:
      UserError: there is none, or one is damaged.
    """
    folders = [p for p in pathlib.Path(folder).glob("seed*") if p.name[4:].isdecimal()]
    found = sorted(folders, key=lambda path: int(path.name[4:]))
    if not found:
        raise UserError(
            f"{folder}: has no folders seed0, seed1, ...; give the folder that holds them"
        )
    return [read(path) for path in found]


def metrics(folder: str | pathlib.Path, stage: str) -> list[dict[str, Any]]:
    """The lines of a stage's ``metrics.jsonl``.

    Raises:
      UserError: it is not there, or damaged.
    """
    path = pathlib.Path(folder) / stage / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a stage that has one") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None


def stage_table(stages: Stages) -> str:
    """What each stage took, cost and came to, rollouts and updates apart."""
    rows, outcomes = [["stage", "wall", "rollouts", "updates", "dollars"]], ["what came out"]
    for name, found in stages.items():
        seconds = found["seconds"]
        cells = [text.duration(seconds[part]) if seconds[part] else "-"
                 for part in ("rollout", "train")]  # fmt: skip
        wall = text.duration(sum(seconds.values()))
        rows.append([name, wall, *cells, text.dollars(found["dollars"])])
        outcomes.append(_outcome(found))
    total = sum(found["dollars"] for found in stages.values())
    wall = text.duration(sum(sum(found["seconds"].values()) for found in stages.values()))
    rows.append(["all", wall, "", "", text.dollars(total)])
    return text.with_notes(rows, [*outcomes, ""])


def _outcome(found: Mapping[str, Any]) -> str:
    if "pass_at" in found:
        return f"pass@1 {_rate(found)}, {100 * found['formed']:.0f} % in form"
    if found.get("before") and found.get("after"):
        return f"pass@1 {_rate(found['before'])} -> {_rate(found['after'])}"
    if "asked" in found:
        return f"{found['right']:,} of {found['asked']:,} answers right, {found['pairs']:,} kept"
    if "pairs" in found:
        return f"{found['pairs']:,} pairs"
    steps = f"{found['step']:,} steps"
    return f"{steps}, held-out loss {found['val_loss']:.4f}" if found.get("val_loss") else steps


def _rate(found: Mapping[str, Any]) -> str:
    measure = found["pass_at"]["1"]
    low, high = measure["interval"]
    return f"{measure['mean']:.3f} ({low:.3f} to {high:.3f})"


def pass_at_1(stages: Stages, model: str) -> float:
    """pass@1 of a stage's model, as the stage ``MODEL_asked`` found it.

    Raises:
      UserError: it was not asked.
    """
    return _stage(stages, f"{model}_asked")["pass_at"]["1"]["mean"]


def differences(runs: Sequence[Stages], ways: Sequence[str], start: str) -> dict[str, Difference]:
    """What each way added to pass@1 of its own seed's start, over seeds.

    The values compared are shares of wrong answers, so a negative mean is a gain. Pairs are by
    seed; the error variance is pooled over ways where they allow it
    (``moejax.analysis.statistics.compare``).

    Args:
      runs: one pipeline a seed, at least two.
      ways: models.
      start: the model that they started from, or that they are held against.

    Raises:
      UserError: fewer than two runs, or a model that was not asked.
    """
    if len(runs) < 2:
        raise UserError("differences over seeds need two seeds; record another")
    wrong = {
        name: {seed: 1 - pass_at_1(stages, name) for seed, stages in enumerate(runs)}
        for name in (start, *ways)
    }
    return compare(wrong, start, power=None).differences


def ways_table(runs: Sequence[Stages], ways: Sequence[str], start: str) -> str:
    """pass@1 and dollars of each way by seed, with its difference to the start over seeds."""
    found = differences(runs, ways, start)
    rows = [["", *(f"seed {seed}" for seed in range(len(runs))), "dollars", "points", "verdict"]]
    for name in (start, *ways):
        rates = [f"{pass_at_1(stages, name):.3f}" for stages in runs]
        mean = float(np.mean([_stage(stages, name)["dollars"] for stages in runs]))
        told = [_points(found[name]), found[name].verdict] if name in found else ["", ""]
        rows.append([name, *rates, text.dollars(mean), *told])
    return text.columns(rows)


def _points(found: Difference) -> str:
    low, high = found.interval
    return f"{-100 * found.mean:+.1f} ({-100 * high:+.1f} to {-100 * low:+.1f})"


def plot_ways(runs: Sequence[Stages], ways: Sequence[str], start: str) -> Figure:
    """pass@1 of each way: a point a seed, with its interval over problems."""
    figure, (axes,) = panel(7.2, 0.8 + 0.45 * (len(ways) + 1))
    names = [start, *ways]
    for place, name in enumerate(reversed(names)):
        colour = GREY if name == start else BLUE
        for seed, stages in enumerate(runs):
            measure = _stage(stages, f"{name}_asked")["pass_at"]["1"]
            height = place + 0.18 * (seed - (len(runs) - 1) / 2)
            axes.plot(measure["interval"], [height] * 2, color=colour, linewidth=1)
            axes.plot(measure["mean"], height, "o", color=colour, markersize=4)
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_xlim(0, 1)
    axes.set_xlabel("pass@1 on held-out problems")
    return figure


def plot_supervised(folder: str | pathlib.Path, stages: Sequence[str]) -> Figure:
    """Training and held-out loss of supervised stages over their steps."""
    figure, columns = panel(4.2 * len(stages), 3.0, len(stages))
    for axes, stage in zip(columns, stages, strict=True):
        lines = metrics(folder, stage)
        for key, colour, mark in (("loss", BLUE, "-"), ("val_loss", RED, "o")):
            seen = [(line["step"], line[key]) for line in lines if key in line]
            if seen:
                axes.plot(*zip(*seen, strict=True), mark, color=colour, markersize=4, label=key)
        axes.set_yscale("log")
        axes.set_title(f"{stage}: nats a token", fontsize=10)
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=9)
    return figure


def plot_reinforced(folder: str | pathlib.Path, stage: str) -> Figure:
    """Right answers, entropy and length of a reinforced stage over its steps; held-out in red."""
    lines = metrics(folder, stage)
    live = [line for line in lines if "reward/accuracy" in line]
    held = [line for line in lines if "eval/pass_at_1" in line]
    shown = (
        ("reward/accuracy", "right answers in rollouts"),
        ("entropy", "entropy, nats a token"),
        ("response/tokens", "tokens an answer"),
    )
    figure, columns = panel(9.6, 2.8, len(shown))
    for axes, (key, title) in zip(columns, shown, strict=True):
        axes.plot([line["step"] for line in live], [line[key] for line in live], color=BLUE)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    columns[0].plot([line["step"] for line in held], [line["eval/pass_at_1"] for line in held], "o",
                    color=RED, markersize=4)  # fmt: skip
    return figure


def step_shares(stages: Stages, names: Sequence[str]) -> str:
    """Where the time of reinforced stages' steps went, in their last processes."""
    rows = [["stage", "rollouts", "rewards", "updates"]]
    for name in names:
        found = _stage(stages, name)
        seconds, rewards = found["last_seconds"], found["reward_seconds"]
        parts = seconds["rollout"] - rewards, rewards, seconds["train"]
        rows.append([name, *(f"{100 * part / sum(parts):.1f} %" for part in parts)])
    return text.columns(rows)


def said(stages: Stages, models: Sequence[str], count: int = 2) -> str:
    """The first answer of each model to the first ``count`` problems of those that are kept."""
    lines, shown = [], {model: _stage(stages, f"{model}_asked")["shown"] for model in models}
    for number, first in enumerate(shown[models[0]][:count]):
        lines.append(f"{first['prompt']}  (right: {first['answer']})")
        for model in models:
            one = shown[model][number]
            judged = "right" if one["right"] else "wrong"
            lines.append(f"  {model:<18}{judged}  {one['said']!r}")
    return "\n".join(lines)


def beside_deepseek(stages: Stages, kinds: Mapping[str, Sequence[str]]) -> str:
    """Dollars of a pipeline by stage beside those of V3 and R1, and each as a share of its sum.

    Args:
      stages: the pipeline's.
      kinds: DeepSeek's stage (``moejax.analysis.bills.stages``), and the pipeline's that do the
        same; a kind that DeepSeek's bill lacks has none of theirs. Stages that are in none are
        "all else".

    Raises:
      UserError: a stage that the pipeline has not.
    """
    theirs = {name: dollars for name, dollars, *_ in bills.stages()}
    ours = {
        kind: sum(_stage(stages, name)["dollars"] for name in names)
        for kind, names in kinds.items()
    }
    named = {name for names in kinds.values() for name in names}
    ours["all else"] = sum(found["dollars"] for n, found in stages.items() if n not in named)
    order = [*theirs, *(kind for kind in ours if kind not in theirs)]
    rows = [["", "DeepSeek", "share", "here", "share"]]
    for kind in order:
        row = [kind]
        for amounts in (theirs, ours):
            amount = amounts.get(kind)
            share = "-" if amount is None else f"{100 * amount / sum(amounts.values()):.1f} %"
            row += ["-" if amount is None else text.dollars(amount), share]
        rows.append(row)
    sums = [text.dollars(sum(amounts.values())) for amounts in (theirs, ours)]
    return text.columns([*rows, ["sum", sums[0], "", sums[1], ""]])


def plot_dollars(stages: Stages) -> Figure:
    """Each stage's dollars by what they went to: rollouts, updates, and all else."""
    figure, (axes,) = panel(7.2, 0.8 + 0.28 * len(stages))
    names = list(stages)[::-1]
    for place, name in enumerate(names):
        found, left = stages[name], 0.0
        seconds = found["seconds"]
        whole = sum(seconds.values()) or 1.0
        rest = whole - seconds["rollout"] - seconds["train"]
        parts = (seconds["rollout"], RED), (seconds["train"], BLUE), (rest, GREEN)
        for part, colour in parts:
            width = found["dollars"] * part / whole
            axes.barh(place, width, left=left, color=colour, height=0.6)
            left += width
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("dollars")
    axes.set_title(plain("red: rollouts; blue: updates; green: all else"), fontsize=10)
    return figure
