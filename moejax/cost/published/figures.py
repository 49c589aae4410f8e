"""What a published bill is made of: figures in print beside what moejax computes.

A figure is ``derived`` where moejax computes it from tokens, architecture, utilisation or times
that were measured elsewhere; only these prove anything. It is ``echoed`` where the source gives
hours and moejax multiplies or adds them up. What is ``implied`` is in no source: it follows from
its hours.
"""

import dataclasses
from typing import Any, Literal

from moejax.cost import flops as counted_flops
from moejax.cost import hardware as chips
from moejax.models.model_config import ModelConfig

Kind = Literal["derived", "echoed", "implied"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
      name: what it is.
      unit: of both values: ``USD``, ``GPU-hours``, ``FLOP``, ``B`` (bytes), ``%`` …
      reported: as published; None where it is implied only.
      computed: by moejax.
      kind: ``derived``, ``echoed`` or ``implied``.
      how: the computation in words.
      source: where it is reported.
      tolerance: relative deviation up to which it counts as reproduced.
      why: where it is not reproduced, the reason.
    """

    name: str
    unit: str
    reported: float | None
    computed: float
    kind: Kind
    how: str
    source: str
    tolerance: float = 0.01
    why: str = ""

    @property
    def deviation(self) -> float | None:
        """Computed over reported, less one."""
        return None if self.reported is None else self.computed / self.reported - 1

    @property
    def reproduced(self) -> bool | None:
        """Whether it lies within the tolerance; None where nothing is reported."""
        # A deviation of exactly the tolerance counts, whatever floating point makes of it.
        return None if self.deviation is None else abs(self.deviation) <= self.tolerance + 1e-12

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        derived = {"deviation": self.deviation, "reproduced": self.reproduced}
        return dataclasses.asdict(self) | derived


@dataclasses.dataclass(frozen=True)
class Bill:
    """A published bill.

    Attributes:
      name: as in ``moejax plan --published=NAME``.
      title: the model, and its size.
      sources: papers and model cards.
      inputs: what is taken from them: tokens, hardware, rates.
      figures: in the order of printing.
    """

    name: str
    title: str
    sources: tuple[str, ...]
    inputs: tuple[str, ...]
    figures: tuple[Figure, ...]

    def figure(self, name: str) -> Figure:
        """The figure of that name."""
        return next(figure for figure in self.figures if figure.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {"name": self.name, "title": self.title, "sources": list(self.sources)}
        return found | {
            "inputs": list(self.inputs),
            "figures": [figure.to_dict() for figure in self.figures],
        }


def train_flops(
    model: ModelConfig, seq_len: int, convention: str = "causal", mtp: str = "without_mtp"
) -> float:
    """Training FLOPs of a token under a named convention: see ``moejax.cost.flops``."""
    return counted_flops.conventions(model, seq_len)[convention]["train"][mtp]


def hours(flops: float, hardware: str, mfu: float) -> float:
    """Device-hours of so many FLOPs at a share of a chip's dense BF16 peak."""
    return flops / (_peak(hardware) * mfu) / 3600


def implied_mfu(flops: float, hardware: str, device_hours: float) -> float:
    """The share of a chip's dense BF16 peak that FLOPs in so many device-hours are."""
    return flops / (_peak(hardware) * device_hours * 3600)


def _peak(hardware: str) -> float:
    peak = chips.lookup(hardware).bf16_flops
    assert peak is not None
    return peak
