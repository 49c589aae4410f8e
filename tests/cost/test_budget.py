"""Amounts as the command line gives them, and what they buy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.cost import prices
from moejax.cost.budget import Budget, Spread, assumed_mfu, buy, mfu_spread, parse, price_spread
from moejax.cost.prices import Price


@pytest.mark.parametrize(
    "text, dollars",
    [("$100k", 1e5), ("100kUSD", 1e5), ("1e5usd", 1e5), ("$1,500", 1500), ("2.5M$", 2.5e6),
     ("5 dollars", 5), (" $ 1B ", 1e9), ("$5_576_000", 5.576e6), ("1e-2$", 0.01)],
)  # fmt: skip
def test_dollars(text, dollars):
    assert parse(text) == Budget(text, pytest.approx(dollars), None)


@pytest.mark.parametrize(
    "text, flops",
    [("1e22flop", 1e22), ("10ZFLOP", 1e22), ("3.3 YFLOPs", 3.3e24), ("1E20FLOP", 1e20),
     ("1EFLOP", 1e18), ("5PFLOP", 5e15)],
)  # fmt: skip
def test_flops(text, flops):
    assert parse(text) == Budget(text, None, pytest.approx(flops))


@pytest.mark.parametrize(
    "text, message",
    [("1e6", "no unit"), ("5k", "no unit"), ("50000", "no unit"), (".5M", "no unit"),
     ("-5$", "above zero"), ("$-5", "above zero"), ("$0", "above zero"), ("nan$", "above zero"),
     ("$inf", "above zero"), ("1e400FLOP", "above zero"), ("nanFLOP", "above zero"),
     ("1e5EUR", "known unit"), ("", "known unit"), ("$", "known unit"), ("lots", "known unit"),
     ("1.2.3$", "no number"), ("1mFLOP", "known unit"), ("$1T", "known unit")],
)  # fmt: skip
def test_what_is_no_amount(text, message):
    """A bare number is what a shell leaves of an unquoted $250000: it is not taken for one."""
    with pytest.raises(ConfigError, match=message) as error:
        parse(text)
    assert "--budget" in str(error.value) and "\n" not in str(error.value)


def test_a_hundred_dollars_by_hand():
    """$100 at $2 are 50 hours; of 1e15 FLOP/s at 40 % that is 50 x 3600 x 4e14 = 7.2e19 FLOP."""
    flops, dollars = buy(
        parse("$100"), peak_flops=1e15, price=Spread(1.0, 2.0, 4.0), mfu=Spread(0.2, 0.4, 0.5)
    )
    assert flops.expected == pytest.approx(7.2e19)
    assert flops.low == pytest.approx(25 * 3600 * 2e14)  # dear and slow
    assert flops.high == pytest.approx(100 * 3600 * 5e14)  # cheap and fast
    assert (dollars.low, dollars.expected, dollars.high) == (100, 100, 100)


@settings(max_examples=50, deadline=None)
@given(st.floats(-2, 9), st.floats(0.01, 100), st.floats(0.01, 1))
def test_dollars_to_flops_and_back(exponent, rate, share):
    price, mfu = Spread(rate / 2, rate, 3 * rate), Spread(share / 2, share, min(1, 2 * share))
    money = 10**exponent
    options = {"peak_flops": 989.4e12, "price": price, "mfu": mfu}
    flops, _ = buy(Budget("", money, None), **options)
    assert flops.low <= flops.expected <= flops.high
    for bought, end in ((flops.low, "high"), (flops.expected, "expected"), (flops.high, "low")):
        _, dollars = buy(Budget("", None, bought), **options)
        assert dollars.low <= dollars.expected <= dollars.high
        assert getattr(dollars, end) == pytest.approx(money)


def test_what_is_given_has_no_range():
    assert mfu_spread(assumed_mfu("h100_sxm", 0.4)) == Spread(0.4, 0.4, 0.4)
    published = mfu_spread(assumed_mfu("h100_sxm", None))
    assert published.low < published.expected < published.high
    assert mfu_spread(assumed_mfu("cpu", None)).expected == 0.15
    assert price_spread(prices.resolve("h100_sxm", 2.0)) == Spread(2.0, 2.0, 2.0)
    known = Price(2.99, "specialised_cloud", "a list", "2025-03", low=1.99)
    assert price_spread(known) == Spread(1.99, 2.99, 2.99)


def test_hours_for_nothing():
    free = Spread(0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match="endless"):
        buy(parse("$1"), peak_flops=1e15, price=free, mfu=Spread(0.1, 0.2, 0.3))
    _, dollars = buy(parse("1EFLOP"), peak_flops=1e15, price=free, mfu=Spread(0.1, 0.2, 0.3))
    assert dollars.high == 0


@pytest.mark.parametrize("mfu", [0.0, 1.5, float("nan")])
def test_no_such_utilisation(mfu):
    with pytest.raises(ConfigError, match=r"cost\.mfu"):
        assumed_mfu("h100_sxm", mfu)
