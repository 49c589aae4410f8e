"""Progress of a run: a live bar on a terminal, plain lines elsewhere. Standard output stays clean.

A ratio is shown with its denominator: MFU stands beside the peak that it assumes.
"""

import math
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import rich.progress
from rich.console import Console, RenderableType
from rich.text import Text


class Progress:
    """Shows how far a run is, on one stream.

    On a terminal: a bar that moves with every ``tick``, and below it the figures of the last
    ``update``. Elsewhere (a file, a pipe, ``TERM=dumb``): one line for every ``update``, and
    nothing for a ``tick``.

    Args:
      total_steps: steps of the whole run.
      start_step: the step that the run begins from; above zero when it is resumed.
      stream: where everything goes; standard error unless given.
      console: a rich console to use in place of ``stream``, always live.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        *,
        console: Console | None = None,
    ):
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._bar: _Bar | None = None
        dumb = os.environ.get("TERM") in ("dumb", "unknown")
        own_terminal = console is None and self._stream.isatty() and not dumb
        if own_terminal:
            console = Console(file=self._stream)
        if console is not None:
            self._bar = _Bar(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TaskProgressColumn(),
                console=console,
                expand=True,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=own_terminal and self._stream is sys.stderr,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step)
            self._bar.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def tick(self, step: int) -> None:
        """Moves the bar; cheap enough for every step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def update(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        peak_flops: float | None = None,
        dollars: float | None = None,
        dollars_to_come: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Shows the figures of a logged step; what is None is left out.

        Args:
          step: optimizer steps done.
          loss: nats per token.
          tokens_per_second: over all devices.
          mfu: model FLOP/s over ``peak_flops``, as a fraction.
          peak_flops: FLOP/s of all devices that MFU is measured against.
          dollars: spent so far.
          dollars_to_come: expected from here to the end.
          seconds_left: expected from here to the end.
        """
        figures = [f"loss {loss:.4g}"]
        if tokens_per_second is not None:
            figures.append(f"{format_si(tokens_per_second)} tokens/s")
        if mfu is not None:
            peak = "" if peak_flops is None else f" of {peak_flops / 1e12:.3g} TFLOP/s"
            figures.append(f"MFU {100 * mfu:.1f} %{peak}")
        if dollars is not None:
            to_come = (
                "" if dollars_to_come is None else f", {format_dollars(dollars_to_come)} to come"
            )
            figures.append(f"{format_dollars(dollars)} so far{to_come}")
        if seconds_left is not None:
            figures.append(f"{format_seconds(seconds_left)} left")
        if self._bar is None:
            self.message("  ".join([f"step {step}/{self._total}", *figures]))
        else:
            self._bar.figures = Text("  ".join(figures))
            self._bar.update(self._task, completed=step, refresh=True)

    def message(self, text: str) -> None:
        """Writes a line, above the bar where there is one."""
        if self._bar is not None and self._bar.live.is_started:
            self._bar.console.print(Text(text), soft_wrap=True)
        elif self._bar is not None:
            self._bar.console.file.write(text + "\n")
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leaves the bar as it stands; may be called twice, and ``message`` still works after."""
        if self._bar is not None:
            self._bar.stop()


class _Bar(rich.progress.Progress):
    """A rich progress bar with a line of figures below it."""

    figures: Text | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures is not None:
            yield self.figures


def format_dollars(dollars: float) -> str:
    """An amount with cents, or with two significant digits where it is less: ``$0.00012``."""
    if not math.isfinite(dollars):
        return "$?"
    sign, size = ("-" if dollars < 0 else ""), abs(dollars)
    if 0 < size < 0.095:
        decimals = 1 - math.floor(math.log10(float(f"{size:.1e}")))
        return f"{sign}${size:.{decimals}f}"
    return f"{sign}${size:,.0f}" if size >= 10_000 else f"{sign}${size:,.2f}"


def format_seconds(seconds: float) -> str:
    """A time in at most two units: ``0.35 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_si(value: float, unit: str = "") -> str:
    """Three significant digits and an SI prefix: ``12.3k``, or ``210 GFLOP/s`` with a unit."""
    if not math.isfinite(value):
        return f"? {unit}".rstrip()
    power = 0
    if value:
        exponent = math.floor(math.log10(abs(float(f"{value:.2e}"))))
        power = min(max(exponent // 3, 0), 8)
    prefix = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")[power]
    number = f"{value / 1000**power:#.3g}".rstrip(".") if power else f"{value:.3g}"
    return f"{number} {prefix}{unit}" if unit else f"{number}{prefix}"
