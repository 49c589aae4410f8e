"""Published bills as tables and figures: what the notebook 'Does 5.6 million add up?' shows."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from moejax.analysis.figures import BLUE, GREEN, GREY, RED, dollar_axis, panel, plain
from moejax.cost import development, lenses, text
from moejax.cost.prices import Price, entry
from moejax.cost.published import deepseek_v3, find
from moejax.cost.published.figures import hours

V3_STAGES = (
    ("pre-training", "pre-training, dollars"),
    ("context extension", "context extension, dollars"),
    ("post-training", "post-training, dollars"),
)
R1_STAGES = (
    ("R1-Zero", "reinforcement learning, dollars", "deepseek_r1_zero"),
    ("SFT data", "SFT data, dollars", "deepseek_r1"),
    ("R1", "R1, dollars", "deepseek_r1"),
)
Stage = tuple[str, float, float, str]


def stages() -> list[Stage]:
    """V3's stages and R1's: name, dollars as published, dollars by moejax, derived or echoed."""
    (v3,) = find("deepseek_v3")
    found = [(name, v3.figure(figure)) for name, figure in V3_STAGES]
    for name, figure, bill in R1_STAGES:
        (published,) = find(bill)
        found.append((name, published.figure(figure)))
    return [(name, f.reported or 0.0, f.computed, f.kind) for name, f in found]


def stages_table() -> str:
    """``stages`` with their sums: V3's 5.576M and R1's 0.294M on top of it."""
    rows = [["", "published", "moejax", "deviation", "kind"]]
    sums = {"V3": [0.0, 0.0], "R1 on top": [0.0, 0.0]}
    for number, (name, reported, computed, kind) in enumerate(stages()):
        total = sums["V3" if number < len(V3_STAGES) else "R1 on top"]
        total[0], total[1] = total[0] + reported, total[1] + computed
        rows.append([f"  {name}", *_dollars(reported, computed), kind])
        if number == len(V3_STAGES) - 1:
            rows.append(["V3", *_dollars(*sums["V3"]), ""])
    rows.append(["R1 on top", *_dollars(*sums["R1 on top"]), ""])
    both = [sum(pair) for pair in zip(*sums.values(), strict=True)]
    rows.append(["both", *_dollars(*both), ""])
    return text.columns(rows)


def _dollars(reported: float, computed: float) -> list[str]:
    deviation = f"{100 * (computed / reported - 1):+.2f} %"
    return [f"${reported:,.0f}", f"${computed:,.0f}", deviation]


def plot_stages() -> Figure:
    """Each stage's dollars, on a logarithmic axis: what is derived, and what is an echo."""
    figure, (axes,) = panel(7.2, 2.9)
    for place, (_, reported, computed, kind) in enumerate(reversed(stages())):
        colour = BLUE if kind == "derived" else GREY
        axes.barh(place, computed, color=colour, height=0.6)
        axes.plot(reported, place, "|", color=RED, markersize=16, markeredgewidth=2)
        axes.text(
            computed * 1.15, place, plain(f"${text.parameters(computed)}"), va="center", fontsize=9
        )
    names = [name for name, *_ in reversed(stages())]
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_xlim(5e3, 3e7)
    dollar_axis(axes.xaxis)
    axes.set_title("blue: derived; grey: echoed hours; red: as published", fontsize=10)
    return figure


def lens_rows(hardware: str = "h800_sxm") -> list[tuple[str, float, str]]:
    """V3's 2,788K hours through every rate and purchase price known for a chip, dearest last."""
    taken = find("deepseek_v3")[0].figure("all stages").computed
    known, found = entry(hardware), []
    for kind, price in known.rates.items():
        for rate in _points(price):
            dollars = taken * rate
            found.append((f"rented, {kind.replace('_', ' ')}, ${rate:.2f}", dollars, price.source))
    if known.purchase is not None:
        bought = known.purchase
        for value in (bought.low, bought.dollars, bought.high):
            cost = None if value is None else lenses.owned(hardware, taken, purchase=value)
            if cost is not None:
                found.append((f"owned, ${value:,.0f} a device", cost.total, bought.source))
    return sorted(found, key=lambda row: row[1])


def _points(price: Price) -> list[float]:
    """A rate's range, of which it is an end itself where the source gives one only, or the rate."""
    rate = price.dollars_per_hour
    ends = (rate if price.low is None else price.low, rate if price.high is None else price.high)
    return sorted(set(ends))


def lens_table(hardware: str = "h800_sxm") -> str:
    """``lens_rows`` as text, with the source of each rate."""
    known = lens_rows(hardware)
    rows = [["", "dollars"], *([name, f"${dollars:,.0f}"] for name, dollars, _ in known)]
    return text.with_notes(rows, ["", *(source for *_, source in known)])


def plot_lenses(chips: Sequence[str] = ("h800_sxm", "h100_sxm")) -> Figure:
    """V3's hours rented and owned, on the chip that it had and on the one that it had not."""
    figure, columns = panel(9.6, 3.0, len(chips))
    for axes, chip in zip(columns, chips, strict=True):
        rows = lens_rows(chip)
        colours = [GREEN if name.startswith("owned") else BLUE for name, *_ in rows]
        axes.barh(range(len(rows)), [dollars for _, dollars, _ in rows], color=colours, height=0.6)
        axes.set_yticks(range(len(rows)), [plain(name) for name, *_ in rows], fontsize=8)
        axes.axvline(5.576e6, color=RED, linewidth=1)
        dollar_axis(axes.xaxis)
        axes.set_title(plain(f"{chip}; red: $5.576M"), fontsize=10)
    return figure


def all_in_table() -> str:
    """V3's and R1's headline beside what it would be with development as others measured it."""
    headline = find("deepseek_r1")[0].figure("with its base model, dollars").computed
    rows = [["", "times", "dollars"], ["headline, V3 and R1", "1", f"${headline:,.0f}"]]
    for known in development.MEASURED:
        dollars = development.all_in(headline, known.multiplier)
        rows.append([f"as {known.project}", f"{known.multiplier:.2f}", f"${dollars:,.0f}"])
    measured = [f"{known.measured} ({known.source})" for known in development.MEASURED]
    return text.with_notes(rows, ["", "", *measured])


def v3_dollars(rate: float = 2.0, mfu: float = deepseek_v3.MFU, failed_share: float = 0.0) -> float:
    """V3's official training at another rate, utilisation and share of lost time.

    Args:
      rate: dollars of a device-hour.
      mfu: utilisation of pre-training, by causal FLOPs without MTP; the other stages' hours stay.
      failed_share: of all device-hours, those that were lost, 0 to below 1.
    """
    flops = deepseek_v3.TOKENS * deepseek_v3.flops_per_token()
    taken = hours(flops, "h800_sxm", mfu)
    taken += deepseek_v3.EXTENSION_HOURS + deepseek_v3.POST_TRAINING_HOURS
    return development.all_in(rate * taken, 1.0, failed_share)


def sensitivity_rows() -> list[tuple[str, float, float]]:
    """V3's dollars at both ends of each assumption, the others as they are."""
    prices = [rate for price in entry("h800_sxm").rates.values() for rate in _points(price)]
    return [
        (f"rate ${min(prices):.2f} to ${max(prices):.2f}",
         v3_dollars(rate=min(prices)), v3_dollars(rate=max(prices))),
        ("utilisation 45 % to 25 %", v3_dollars(mfu=0.45), v3_dollars(mfu=0.25)),
        ("lost time 0 to 20 %", v3_dollars(), v3_dollars(failed_share=0.2)),
        ("development 1 to 1.5 times", v3_dollars(), 1.5 * v3_dollars()),
        ("development 1 to 5.6 times", v3_dollars(),
         development.MEASURED[1].multiplier * v3_dollars()),
    ]  # fmt: skip


def plot_sensitivity() -> Figure:
    """Left: one assumption at a time. Right: dollars over the rate, by lost time."""
    figure, (left, right) = panel(9.6, 3.2, 2)
    rows = sensitivity_rows()
    for place, (_, low, high) in enumerate(reversed(rows)):
        left.barh(place, high - low, left=low, color=BLUE, height=0.6)
    left.set_yticks(range(len(rows)), [plain(name) for name, *_ in reversed(rows)], fontsize=9)
    left.axvline(v3_dollars(), color=RED, linewidth=1)
    left.set_xlim(left=0)
    dollar_axis(left.xaxis)
    left.set_title("one assumption at a time", fontsize=10)
    rates = [1 + 0.25 * step for step in range(13)]
    for share, colour in ((0.0, GREEN), (0.1, BLUE), (0.3, GREY)):
        dollars = [v3_dollars(rate, failed_share=share) for rate in rates]
        right.plot(rates, dollars, color=colour, label=f"{100 * share:.0f} % of the time lost")
    right.plot(2.0, 5.576e6, "o", color=RED)
    right.set_xlabel("dollars of an H800 for an hour")
    right.set_ylim(bottom=0)
    dollar_axis(right.yaxis)
    right.legend(frameon=False, fontsize=9)
    return figure
