"""What the figures of several modules share: colours, axes, and amounts on them."""

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from moejax.cost import text

BLUE, RED, GREY, GREEN = "#4878a8", "#c8553d", "#777777", "#5b8c5a"


def panel(width: float = 6.4, height: float = 3.6, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with its axes, plain, and closed to pyplot: only who asked for it shows it."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    found = [axes] if columns == 1 else list(axes)
    for each in found:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    plt.close(figure)
    return figure, found


def dollar_axis(axis) -> None:
    """Ticks such as $5.5M along an axis."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: rf"\${text.parameters(value)}"))


def plain(label: str) -> str:
    """A label whose dollars are no mathematics."""
    return label.replace("$", r"\$")
