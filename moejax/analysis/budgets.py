"""What budgets buy, law by law: tables and figures of the notebook 'From a budget to a model'."""

import math
from typing import Any

from matplotlib.figure import Figure

from moejax.analysis.figures import dollar_axis, panel
from moejax.cost import budget_text, text
from moejax.cost import hardware as chips
from moejax.cost.budget_plan import DEFAULT_LAW, plan_budget
from moejax.cost.plan_text import format_plan
from moejax.cost.prices import resolve
from moejax.cost.scaling_laws import KRAJEWSKI, KRAJEWSKI_DENSE, LAWS
from moejax.cost.utilisation import assumed
from moejax.parallel.layout import placed

HARDWARE, LENGTH = "h100_sxm", 4096
BUDGETS = [10 ** (3 + power / 4) for power in range(21)]  # $1K to $100M
_STYLES = ("-", "--", ":")


def planned(amount: str, law: str = DEFAULT_LAW, hardware: str = HARDWARE) -> dict[str, Any]:
    """``moejax plan --budget=AMOUNT --law=LAW``, on the suggested mesh."""
    return plan_budget(
        amount, hardware=hardware, seq_len=LENGTH, law=law, place=placed(hardware, LENGTH)
    )


def advice(amount: str) -> str:
    """What each law advises, by its own count."""
    found = planned(amount)
    return f"{budget_text.budget_line(found)}\n\n{budget_text.advice_table(found['laws'])}"


def models(amount: str) -> str:
    """The same as models of moejax."""
    return budget_text.model_table(planned(amount)["laws"])


def bill(amount: str, law: str = DEFAULT_LAW) -> str:
    """The plan of one law's model."""
    return format_plan(planned(amount, law)["plan"])


def flops_of(dollars: float, hardware: str = HARDWARE) -> float:
    """Training FLOPs that dollars buy at the book's rate and the assumed utilisation."""
    peak, _ = chips.peak_flops(hardware, 1)
    rate = resolve(hardware).dollars_per_hour
    return dollars / rate * 3600 * peak * assumed(hardware).mfu


def _optima(name: str) -> list[tuple[float, Any, bool]]:
    """A law's advice over ``BUDGETS``: dollars, optimum, and whether it is extrapolated."""
    law, found = LAWS[name], []
    for dollars in BUDGETS:
        optimum = law.optimum(flops_of(dollars))
        found.append((dollars, optimum, bool(law.beyond(optimum))))
    return found


def _drawn(axes, name: str, number: int, value: str) -> None:
    """One law's line, with dots where its own experiments reach."""
    points = [(dollars, getattr(o, value), beyond) for dollars, o, beyond in _optima(name)]
    style, colour = _STYLES[number // 4], f"C{number}"
    xs, ys = [x for x, *_ in points], [y for _, y, _ in points]
    axes.plot(xs, ys, style, color=colour, linewidth=1.2, label=name)
    within = [(x, y) for x, y, beyond in points if not beyond]
    axes.plot(*zip(*within, strict=True) if within else ([], []), "o", color=colour, markersize=3)


def plot_advice() -> Figure:
    """Active parameters and tokens over dollars, by law; dots: within the law's experiments."""
    figure, (left, right) = panel(9.6, 3.8, 2)
    for number, name in enumerate(LAWS):
        _drawn(left, name, number, "active_params")
        _drawn(right, name, number, "tokens")
    for axes, title in ((left, "active parameters"), (right, "tokens")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{title}; dots: within the law's experiments", fontsize=10)
        axes.set_xlabel(f"budget on {HARDWARE}")
        dollar_axis(axes.xaxis)
    left.legend(frameon=False, fontsize=7)
    return figure


def plot_losses() -> Figure:
    """Predicted loss over dollars, a panel for each text: losses of two texts do not compare."""
    predicting = [name for name in LAWS if LAWS[name].optimum(1e20).loss is not None]
    corpora = list(dict.fromkeys(LAWS[name].facts.corpus for name in predicting))
    figure, columns = panel(9.6, 3.2, len(corpora))
    for axes, corpus in zip(columns, corpora, strict=True):
        for number, name in enumerate(predicting):
            if LAWS[name].facts.corpus == corpus:
                _drawn(axes, name, number, "loss")
        axes.set_xscale("log")
        axes.set_title(f"nats a token of {corpus}", fontsize=10)
        dollar_axis(axes.xaxis)
        axes.legend(frameon=False, fontsize=7)
    return figure


def plot_granularity(dollars: tuple[float, ...] = (1e3, 1e5, 1e7)) -> Figure:
    """Loss over granularity at several budgets (Krajewski 2024), and of a dense model of each."""
    figure, (axes,) = panel(6.4, 3.4)
    grains = [2**power for power in range(7)]
    for number, budget in enumerate(dollars):
        flops = flops_of(budget)
        losses = [KRAJEWSKI.optimum_at(flops, grain).loss for grain in grains]
        label = rf"\${text.parameters(budget)}"
        axes.plot(grains, losses, "o-", color=f"C{number}", markersize=4, label=label)
        axes.axhline(KRAJEWSKI_DENSE.optimum(flops).loss, color=f"C{number}", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(grains, [str(grain) for grain in grains])
    axes.set_xlabel("granularity G: experts so many times finer; dotted: dense")
    axes.set_ylabel("nats a token of C4")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def saving_table(dollars: tuple[float, ...] = (1e3, 1e4, 1e5, 1e6, 1e7)) -> str:
    """What a dense model of the fine-grained mixture's loss would cost, by Krajewski's laws."""
    rows = [["budget", "loss", "dense loss", "dense dollars for the same", "times"]]
    for budget in dollars:
        loss = KRAJEWSKI.optimum(flops_of(budget)).loss
        dense = _dense_dollars(loss)
        rows.append([
            f"${text.parameters(budget)}", f"{loss:.3f}",
            f"{KRAJEWSKI_DENSE.optimum(flops_of(budget)).loss:.3f}",
            f"${text.parameters(dense)}", f"{dense / budget:.1f}",
        ])  # fmt: skip
    return text.columns(rows)


def _dense_dollars(loss: float) -> float:
    """Dollars at which the dense law reaches a loss; its loss falls with every dollar."""
    low, high = math.log(1.0), math.log(1e15)
    while high - low > 1e-6:
        middle = (low + high) / 2
        if KRAJEWSKI_DENSE.optimum(flops_of(math.exp(middle))).loss > loss:
            low = middle
        else:
            high = middle
    return math.exp(high)
