"""One amount of work, several honest answers to what it cost; each answer is a lens.

``rental`` is what the device-hours cost to rent, ``owned`` what they cost an owner. ``headline``
counts the runs that became the model, ``all_in`` every run that there was. Serving has its own:
dollars per million tokens, and the volume from which a deployment beats a list price.
"""

import dataclasses
import datetime
import math
from collections.abc import Sequence
from typing import Any

from moejax.config import check
from moejax.cost import energy, prices
from moejax.cost import owned as formula
from moejax.cost.prices import Price, Purchase

LENSES = {
    "rental": "device-hours at a rate",
    "owned": "depreciation of bought devices, network and energy",
    "headline": "the runs that became the model",
    "all_in": "every run: ablations, failures and idle time too",
}


def rental(device_hours: float, price: Price) -> float:
    """What device-hours cost to rent, US dollars."""
    return device_hours * price.dollars_per_hour


@dataclasses.dataclass(frozen=True)
class OwnedCost:
    """What device-hours cost an owner, US dollars.

    Attributes:
      hardware: value that the devices lost.
      network: their share of the cluster's network.
      energy: electricity, of server and data centre too.
      purchase: the price of a device that this is from.
    """

    hardware: float
    network: float
    energy: float
    purchase: Purchase

    @property
    def total(self) -> float:
        """All parts together."""
        return self.hardware + self.network + self.energy


def owned(
    hardware: str,
    device_hours: float,
    *,
    purchase: Purchase | float | None = None,
    years_since_acquisition: float = 0.0,
    pue: float | None = None,
    dollars_per_kwh: float = energy.DOLLARS_PER_KWH,
) -> OwnedCost | None:
    """What device-hours cost an owner, by Epoch AI's formula (``moejax.cost.owned``).

    Hours in which a bought device idles are not in it: staff, buildings and idle time are what
    renting adds.

    Args:
      hardware: a chip's name.
      device_hours: hours, all devices together.
      purchase: what a device costs, dollars alone or with their source; None takes the packaged
        book's.
      years_since_acquisition: age of the devices.
      pue: power usage effectiveness; None takes the chip's usual one.
      dollars_per_kwh: price of electricity.

    Returns:
      The parts, or None where the purchase price or the power is not known.

    Raises:
      ConfigError: no such chip, or a value out of range.
    """
    check_kwh_price(dollars_per_kwh)
    check(
        years_since_acquisition >= 0, "years_since_acquisition", years_since_acquisition,
        "must not be below zero",
    )  # fmt: skip
    if purchase is None:
        purchase = prices.purchase(hardware)
    elif not isinstance(purchase, Purchase):
        good = math.isfinite(purchase) and purchase >= 0
        check(good, "purchase", purchase, "must be a number of dollars, 0 or above")
        purchase = Purchase(float(purchase), "given", datetime.date.today().isoformat())
    kwh = energy.kilowatt_hours(hardware, device_hours, pue)
    if purchase is None or kwh is None:
        return None
    hourly = formula.hardware_dollars_per_hour(purchase.dollars, years_since_acquisition)
    network = formula.network_dollars_per_hour(hourly)
    return OwnedCost(hourly * device_hours, network * device_hours, kwh * dollars_per_kwh, purchase)


def check_kwh_price(dollars_per_kwh: float) -> None:
    """Raises ConfigError unless a price of electricity is finite and not below zero."""
    good = math.isfinite(dollars_per_kwh) and 0 <= dollars_per_kwh <= 1e6
    check(good, "cost.dollars_per_kwh", dollars_per_kwh,
          "must be a number of dollars, 0 or above, and at most 1e6")  # fmt: skip


def headline(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the ledger's runs, those marked ``cost.final``."""
    return [run for run in runs if run["final"]]


def all_in(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All of the ledger's runs, failed and abandoned ones included."""
    return list(runs)
