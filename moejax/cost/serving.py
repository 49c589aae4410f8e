"""The lens of serving: what a token costs to make, and what it sells for.

A list price is not a cost: a deployment costs the same whether its devices are busy or not, so
its cost of a token follows from a throughput, and its profit from the volume.
"""

import dataclasses
import math
import types

from moejax.config import check, nearest

MILLION = 1e6
SECONDS_PER_HOUR, HOURS_PER_DAY = 3600, 24


@dataclasses.dataclass(frozen=True)
class ListPrice:
    """What a model's maker charges, US dollars for a million tokens.

    Attributes:
      cache_hit, cache_miss: of input, found in the maker's cache of earlier prompts or not.
      output: of output.
      source, date: who says so, and when.
    """

    cache_hit: float
    cache_miss: float
    output: float
    source: str
    date: str

    def revenue(self, cache_hit: float, cache_miss: float, output: float) -> float:
        """What so many tokens of each kind bring in, US dollars."""
        spent = cache_hit * self.cache_hit + cache_miss * self.cache_miss + output * self.output
        return spent / MILLION

    def blended(self, input_per_output: float, cache_hit_share: float = 0.0) -> float:
        """Dollars for a million output tokens, the input that comes with them included.

        Args:
          input_per_output: input tokens for each output token.
          cache_hit_share: share of the input that is found in the cache, 0 to 1.
        """
        check(0 <= cache_hit_share <= 1, "cache_hit_share", cache_hit_share, "must be from 0 to 1")
        hit = input_per_output * cache_hit_share
        return self.revenue(hit * MILLION, (input_per_output - hit) * MILLION, MILLION)


LIST_PRICES = types.MappingProxyType({
    "deepseek_v3": ListPrice(0.07, 0.27, 1.10, "api-docs.deepseek.com", "2025-02"),
    "deepseek_r1": ListPrice(0.14, 0.55, 2.19, "api-docs.deepseek.com", "2025-02"),
    "o1": ListPrice(7.50, 15.0, 60.0, "openai.com/api/pricing", "2025-02"),
    "gpt_4o": ListPrice(1.25, 2.50, 10.0, "openai.com/api/pricing", "2025-02"),
})  # fmt: skip


def list_price(model: str) -> ListPrice:
    """The list price of a model.

    Raises:
      ConfigError: no such model in the table; the nearest is offered.
    """
    known = model in LIST_PRICES
    check(known, "model", model, f"no list price is known; {nearest(model, LIST_PRICES)}")
    return LIST_PRICES[model]


def dollars_per_million_tokens(tokens_per_second: float, dollars_per_hour: float) -> float:
    """What a million tokens cost to make at full load, US dollars.

    Args:
      tokens_per_second: of one device, averaged over the hours that are paid for.
      dollars_per_hour: the rate of one device.

    Raises:
      ConfigError: a throughput that is not above zero, or a rate below zero.
    """
    _check_positive("tokens_per_second", tokens_per_second)
    check(dollars_per_hour >= 0, "dollars_per_hour", dollars_per_hour, "must not be below zero")
    return dollars_per_hour / (tokens_per_second * SECONDS_PER_HOUR) * MILLION


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """From which volume a deployment is cheaper than buying tokens at a list price.

    Attributes:
      dollars_per_day: what the deployment costs, busy or not.
      tokens_per_day: tokens at which both cost the same; more, and the deployment is cheaper.
      capacity_per_day: tokens that it can make.
      load: the first over the second; above 1 the deployment never pays.
    """

    dollars_per_day: float
    tokens_per_day: float
    capacity_per_day: float

    @property
    def load(self) -> float:
        """Share of the capacity that has to be used."""
        return self.tokens_per_day / self.capacity_per_day

    @property
    def possible(self) -> bool:
        """Whether the deployment can make as many tokens as that."""
        return self.load <= 1


def break_even(
    devices: int, dollars_per_hour: float, tokens_per_second: float, list_dollars_per_million: float
) -> BreakEven:
    """The break-even volume of a deployment against a list price.

    Args:
      devices: of the deployment.
      dollars_per_hour: the rate of one device.
      tokens_per_second: of one device at full load.
      list_dollars_per_million: what a million tokens cost to buy (``ListPrice.blended`` where the
        throughput counts output tokens and the input comes with them).

    Raises:
      ConfigError: a value out of range.
    """
    check(devices > 0, "devices", devices, "must be above zero")
    check(dollars_per_hour >= 0, "dollars_per_hour", dollars_per_hour, "must not be below zero")
    _check_positive("tokens_per_second", tokens_per_second)
    _check_positive("list_dollars_per_million", list_dollars_per_million)
    day = devices * dollars_per_hour * HOURS_PER_DAY
    return BreakEven(
        day,
        day / list_dollars_per_million * MILLION,
        devices * tokens_per_second * SECONDS_PER_HOUR * HOURS_PER_DAY,
    )


def tokens_to_repay(dollars: float, list_per_million: float, cost_per_million: float) -> float:
    """Tokens to sell until their profit has repaid an investment, such as a training bill.

    Args:
      dollars: the investment.
      list_per_million: what a million tokens sell for.
      cost_per_million: what they cost to make.

    Returns:
      Tokens; infinite where nothing is earned on a token.

    Raises:
      ConfigError: a value below zero.
    """
    for name, value in (("dollars", dollars), ("list_per_million", list_per_million),
                        ("cost_per_million", cost_per_million)):  # fmt: skip
        check(value >= 0, name, value, "must not be below zero")
    profit = list_per_million - cost_per_million
    return dollars / profit * MILLION if profit > 0 else math.inf


def _check_positive(name: str, value: float) -> None:
    good = math.isfinite(value) and value > 0
    check(good, name, value, "must be a finite number above zero")
