"""What an hour of a device costs, and to buy one; when, and who says so.

Prices move: a rate is nothing without its date and source, and a run records the rate that it was
charged at. The packaged book is ``prices.yaml``; a user's own book has the same form and goes
before it.
"""

import datetime
import functools
import math
import os
import pathlib

from moejax.config import ConfigError, check, nearest
from moejax.cost import energy, owned
from moejax.cost import hardware as chips
from moejax.cost.price_book import KINDS, Entry, Price, Purchase, read_book

__all__ = ["KINDS", "Entry", "Price", "Purchase", "entry", "purchase", "resolve"]

MOST_DOLLARS = 1e9  # of an hour: beyond any device, and far from where bills overflow
PACKAGED = pathlib.Path(__file__).with_name("prices.yaml")


@functools.cache
def packaged() -> dict[str, Entry]:
    """The packaged book, by chip."""
    return read_book(PACKAGED, "moejax")


def entry(hardware: str, book: str | os.PathLike | None = None) -> Entry:
    """What is known of a chip's prices: the packaged book with a user's over it.

    Args:
      hardware: a chip's name.
      book: a user's own file: its rates replace packaged ones of the same kind, its default and
        its purchase price the packaged ones.

    Raises:
      ConfigError, UserError: no such chip, or a book that cannot be used.
    """
    chips.lookup(hardware)
    ours = packaged().get(hardware, Entry())
    theirs = Entry() if book is None else read_book(book).get(hardware, Entry())
    return Entry(
        theirs.default or ours.default, {**ours.rates, **theirs.rates},
        theirs.purchase or ours.purchase,
    )  # fmt: skip


def resolve(
    hardware: str,
    price: float | None = None,
    *,
    kind: str | None = None,
    book: str | os.PathLike | None = None,
    pue: float | None = None,
    dollars_per_kwh: float = energy.DOLLARS_PER_KWH,
) -> Price:
    """The rate that a run is charged at.

    Args:
      hardware: a chip's name.
      price: ``cost.price``, dollars per device-hour; None takes a book's.
      kind: which of the books' rates; None takes the chip's default. ``owned`` is computed from
        the purchase price (``moejax.cost.owned``) where no book has such a rate: that of a new
        device, for the hours that it is used.
      book: a user's own file of prices.
      pue, dollars_per_kwh: of the computed rate's energy; see ``moejax.cost.energy``.

    Raises:
      ConfigError: no such chip, a price below zero or not finite, a price and a kind together, no
        known rate of that kind, a book that cannot be used.
      UserError: a book that cannot be read.
    """
    chips.lookup(hardware)
    if price is not None:
        check_price(price)
        check_alone(kind)
        return Price(float(price), "user", "config", datetime.date.today().isoformat())
    known = entry(hardware, book)
    kind = kind or known.default
    if kind in known.rates:
        return known.rates[kind]
    if kind == "owned" and known.purchase is not None:
        return _owned(hardware, known.purchase, pue, dollars_per_kwh)
    if kind is None:
        offer = "" if known.purchase is None else ", or cost.price_kind = 'owned'"
        raise ConfigError(
            "cost.price", None,
            f"no rate is known for {hardware}; set dollars per device-hour{offer}",
        )  # fmt: skip
    check_kind(kind)
    names = [*known.rates, *(["owned"] if known.purchase else [])]
    raise ConfigError(
        "cost.price_kind", kind,
        f"no such rate is known for {hardware}; known: {', '.join(names) or 'none'}",
    )  # fmt: skip


def check_kind(kind: str) -> None:
    """Raises ConfigError unless there is such a kind of rate."""
    good = kind in KINDS
    check(good, "cost.price_kind", kind, f"no such kind of rate; {nearest(kind, KINDS)}")


def _owned(
    hardware: str, bought: Purchase, pue: float | None, dollars_per_kwh: float
) -> Price:  # fmt: skip
    """The rate of a new device that one owns, computed from what it costs to buy."""
    power = energy.kilowatts(hardware, pue)
    if power is None:
        raise ConfigError(
            "cost.price_kind", "owned", f"{hardware}'s power is not published; set cost.price"
        )

    def rate(dollars: float | None) -> float | None:
        if dollars is None:
            return None
        worn = owned.hardware_dollars_per_hour(dollars)
        return worn + owned.network_dollars_per_hour(worn) + power * dollars_per_kwh

    return Price(
        rate(bought.dollars), "owned",
        f"Epoch AI's formula on ${bought.dollars:,.0f} ({bought.source})",
        bought.date, rate(bought.low), rate(bought.high), bought.book,
    )  # fmt: skip


def purchase(hardware: str, book: str | os.PathLike | None = None) -> Purchase | None:
    """What a chip costs to buy; None where nobody says.

    Args and errors: see ``entry``.
    """
    return entry(hardware, book).purchase


def check_price(price: float) -> None:
    """Raises ConfigError unless a price is possible: dollars of an hour, not below zero."""
    if not math.isfinite(price) or price < 0:
        raise ConfigError("cost.price", price, "must be a finite number of dollars, 0 or above")
    check(price <= MOST_DOLLARS, "cost.price", price, f"must be at most {MOST_DOLLARS:g} dollars")


def check_alone(kind: str | None) -> None:
    """Raises ConfigError where a kind of rate is asked for and a price is given too."""
    check(kind is None, "cost.price_kind", kind, "has no use beside cost.price; leave one out")
