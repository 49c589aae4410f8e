"""The price book and a user's own rate."""

import datetime
import math

import pytest

from moejax.config import ConfigError
from moejax.cost.hardware import CHIPS
from moejax.cost.prices import PRICES, resolve


def test_every_rate_has_a_source_and_a_date_and_lies_in_its_range():
    assert PRICES.keys() <= CHIPS.keys()
    for price in PRICES.values():
        assert price.dollars_per_hour > 0
        assert price.source and price.kind
        assert 2020 <= int(price.date[:4]) <= 2030
        if price.low is not None:
            assert price.low <= price.dollars_per_hour <= price.high


def test_v3s_rate():
    price = resolve("h800_sxm")
    assert (price.dollars_per_hour, price.date) == (2.0, "2024-12")
    assert "DeepSeek-V3" in price.source


def test_a_users_rate_overrides_the_book_and_zero_is_a_rate():
    price = resolve("h800_sxm", 3)
    assert (price.dollars_per_hour, price.kind, price.source) == (3.0, "user", "config")
    assert price.date == datetime.date.today().isoformat()
    assert resolve("h20", 0.0).dollars_per_hour == 0.0


@pytest.mark.parametrize("price", [-1.0, math.nan, math.inf])
def test_bad_rates(price):
    with pytest.raises(ConfigError, match=r"cost\.price = .*: must be a finite number"):
        resolve("cpu", price)


def test_a_chip_without_a_known_rate_asks_for_one():
    with pytest.raises(ConfigError, match=r"cost\.price = None: no rate is known for h20; set"):
        resolve("h20")


def test_an_unknown_chip():
    with pytest.raises(ConfigError, match=r"cost\.hardware = 'h80': no such chip; did you mean"):
        resolve("h80", 1.0)
