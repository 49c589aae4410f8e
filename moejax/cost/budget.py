"""A budget as the command line gives it, and what it buys: dollars to FLOPs and back."""

import dataclasses
import math
import re

from moejax.config import ConfigError, check
from moejax.cost import utilisation
from moejax.cost.prices import Price
from moejax.cost.utilisation import Utilisation

FLAG = "--budget"
SYNTAX = "write dollars as '$100k', 100kUSD or 1e5USD, FLOPs as 1e22FLOP or 10ZFLOP"

_NUMBER = r"([+-]?(?:[\d.,_]+(?:e[+-]?\d+)?|nan|inf(?:inity)?))"
_MONEY = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_SI = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21, "Y": 1e24}
_DOLLARS = (
    re.compile(rf"\$\s*{_NUMBER}\s*([kmb]?)", re.IGNORECASE),
    re.compile(rf"{_NUMBER}\s*([kmb]?)\s*(?:\$|usd|dollars?)", re.IGNORECASE),
)
_FLOPS = re.compile(rf"(?i:{_NUMBER})\s*([kMGTPEZY]?)(?i:flops?)")


@dataclasses.dataclass(frozen=True)
class Budget:
    """An amount to spend.

    Attributes:
      text: as it was given.
      dollars: US dollars; None where FLOPs were given.
      flops: training FLOPs, as ``moejax.cost.counts`` counts them; None where dollars were given.
    """

    text: str
    dollars: float | None
    flops: float | None


@dataclasses.dataclass(frozen=True)
class Spread:
    """A figure with its range: ``low`` is the smallest, ``high`` the largest."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> "Spread":
        """All three multiplied."""
        return Spread(self.low * factor, self.expected * factor, self.high * factor)


def parse(text: str) -> Budget:
    """Reads a budget: ``$100k``, ``100kUSD``, ``1e22FLOP``, ``10ZFLOP``.

    A bare number is refused: a shell turns an unquoted ``$250000`` into ``50000``.

    Raises:
      ConfigError: no unit, an unknown one, or an amount that is not a finite number above zero.
    """
    stripped = text.strip()
    for pattern in _DOLLARS:
        if found := pattern.fullmatch(stripped):
            return Budget(text, _amount(text, found, _MONEY), None)
    if found := _FLOPS.fullmatch(stripped):
        return Budget(text, None, _amount(text, found, _SI))
    if re.fullmatch(_NUMBER + "[a-z]?", stripped, re.IGNORECASE):
        raise ConfigError(FLAG, text, f"has no unit; {SYNTAX}")
    raise ConfigError(FLAG, text, f"is no amount with a known unit; {SYNTAX}")


def _amount(text: str, found: re.Match[str], sizes: dict[str, float]) -> float:
    """The number of a match times its prefix."""
    digits, prefix = found.groups()
    try:
        value = float(digits.replace(",", "").replace("_", ""))
    except ValueError:
        raise ConfigError(FLAG, text, f"is no number; {SYNTAX}") from None
    value *= sizes[prefix.lower() if prefix.lower() in sizes else prefix]
    check(math.isfinite(value) and value > 0, FLAG, text, "must be a finite amount above zero")
    return value


def assumed_mfu(hardware: str, mfu: float | None, source: str | None = None) -> Utilisation:
    """The utilisation to assume: one given has no range, else a published one or a default.

    Raises:
      ConfigError: not above 0 and at most 1.
    """
    if mfu is None:
        return utilisation.assumed(hardware)
    return utilisation.given(mfu, source or "given")


def mfu_spread(used: Utilisation) -> Spread:
    """A utilisation with its range."""
    return Spread(used.low, used.mfu, used.high)


def price_spread(price: Price) -> Spread:
    """Dollars of a device-hour: a price of one figure has no range."""
    rate = price.dollars_per_hour
    return Spread(
        rate if price.low is None else price.low, rate, rate if price.high is None else price.high
    )


def buy(budget: Budget, *, peak_flops: float, price: Spread, mfu: Spread) -> tuple[Spread, Spread]:
    """What a budget buys.

    Args:
      budget: dollars or FLOPs.
      peak_flops: dense peak of one device, FLOP/s.
      price: dollars of a device-hour.
      mfu: utilisation.

    Returns:
      (training FLOPs, rental dollars): the one that was given has no range, the other's low and
      high take the utilisation and the rate at their worst or best together.

    Raises:
      ConfigError: a budget in dollars where a device-hour costs nothing.
    """
    # dollars of one FLOP
    rate = Spread(
        price.low / (3600 * peak_flops * mfu.high),
        price.expected / (3600 * peak_flops * mfu.expected),
        price.high / (3600 * peak_flops * mfu.low),
    )
    if budget.dollars is None:
        assert budget.flops is not None
        return Spread(budget.flops, budget.flops, budget.flops), rate.times(budget.flops)
    check(rate.low > 0, "cost.price", price.low, f"buys endless FLOPs; give {FLAG} in FLOPs")
    money = budget.dollars
    flops = Spread(money / rate.high, money / rate.expected, money / rate.low)
    return flops, Spread(money, money, money)
