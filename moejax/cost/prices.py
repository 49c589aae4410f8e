"""The price book: what an hour of a device costs, when, and who says so.

Prices move: a rate is nothing without its date and source, and a run records the rate that it was
charged at. Where sources give a range, ``low`` and ``high`` keep it and the rate is its middle.
"""

import dataclasses
import datetime
import math
from typing import Any

from moejax.config import ConfigError
from moejax.cost import hardware as chips


@dataclasses.dataclass(frozen=True)
class Price:
    """A rate.

    Attributes:
      dollars_per_hour: US dollars of one device for one hour.
      kind: ``on_demand``, ``specialised_cloud``, ``assumed`` (a report's own) or ``user``.
      source: who says so.
      date: when, as YYYY-MM-DD or as much of it as is known.
      low, high: the range that the source gives; None where it gives one figure.
    """

    dollars_per_hour: float
    kind: str
    source: str
    date: str
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def _middle(low: float, high: float, date: str, source: str) -> Price:
    rate = round((low + high) / 2, 2)
    return Price(rate, "specialised_cloud", f"middle of the range of {source}", date, low, high)


_SEEN = "specialised clouds' list prices"
_GOOGLE = "cloud.google.com/tpu/pricing, US on demand"
_V3 = "assumed in DeepSeek-V3's technical report, arXiv 2412.19437, table 1"
_VCPU = "approximate: a quarter of AWS m6i.xlarge (4 vCPU, $0.192/h), us-east-1, on demand"

PRICES: dict[str, Price] = {
    "a100_80gb_sxm": _middle(1.49, 2.49, "2026", _SEEN),
    "h100_sxm": _middle(1.99, 3.99, "2025-03", _SEEN),
    "h800_sxm": Price(2.0, "assumed", _V3, "2024-12"),
    "h200_sxm": _middle(2.5, 4.0, "2025-03", _SEEN),
    "b200": _middle(3.0, 6.0, "2025-03", _SEEN),
    "tpu_v4": Price(3.22, "on_demand", _GOOGLE, "2025"),
    "tpu_v5e": Price(1.20, "on_demand", _GOOGLE, "2025"),
    "tpu_v5p": Price(4.20, "on_demand", _GOOGLE, "2025"),
    "tpu_v6e": Price(2.70, "on_demand", _GOOGLE, "2025"),
    "cpu": Price(0.048, "on_demand", _VCPU, "2026-06"),
}

# Dollars to buy one device with its share of a server, for the "owned" lens; known for one chip.
PURCHASE_DOLLARS: dict[str, float] = {"h800_sxm": 33_800.0}


def resolve(hardware: str, price: float | None = None) -> Price:
    """The rate that a run is charged at: the user's, or else the book's.

    Args:
      hardware: a chip's name.
      price: ``cost.price``, dollars per device-hour; None takes the book's.

    Raises:
      ConfigError: no such chip, a price below zero or not finite, or a chip without a known rate.
    """
    chips.lookup(hardware)
    if price is not None:
        check_price(price)
        return Price(float(price), "user", "config", datetime.date.today().isoformat())
    if hardware not in PRICES:
        raise ConfigError(
            "cost.price", None, f"no rate is known for {hardware}; set dollars per device-hour"
        )
    return PRICES[hardware]


def check_price(price: float) -> None:
    """Raises ConfigError unless a price is finite and not below zero."""
    if not math.isfinite(price) or price < 0:
        raise ConfigError("cost.price", price, "must be a finite number of dollars, 0 or above")
