"""Rental against owned, headline against all-in."""

import math

import pytest

from moejax.config import ConfigError
from moejax.cost import lenses, prices

V3_HOURS = 2.788e6  # technical report (arXiv 2412.19437), table 1


def test_v3_by_the_rental_lens():
    """The famous figure: 2,788K H800 hours at $2."""
    assert lenses.rental(V3_HOURS, prices.resolve("h800_sxm")) == pytest.approx(5.576e6)


@pytest.mark.parametrize("price, millions", [(33_800, 4.5), (44_750, 5.9)])
def test_v3_by_the_owned_lens(price, millions):
    """By Epoch AI's formula, with H800s at $33.8k or $44.75k: about $4.5M or $5.9M."""
    found = lenses.owned("h800_sxm", V3_HOURS, purchase=price)
    assert found.total == pytest.approx(millions * 1e6, rel=0.01)
    assert found.purchase.source == "given"


def test_the_book_has_both_of_v3s_purchase_prices():
    bought = prices.purchase("h800_sxm")
    assert (bought.dollars, bought.high) == (33_800, 44_750)
    assert lenses.owned("h800_sxm", V3_HOURS).purchase == bought


def test_the_parts_by_hand():
    """$10,000 of an A100 for 8,766 h: 10,000 x 0.14 ln 10; the network 19 % of 100; the energy."""
    found = lenses.owned("a100_80gb_sxm", 8766, purchase=10_000.0)
    assert found.hardware == pytest.approx(10_000 * 0.14 * math.log(10))
    assert found.network / (found.hardware + found.network) == pytest.approx(0.19)
    assert found.energy == pytest.approx(8766 * 0.4 * 2.03 * 0.75 * 1.25 * 0.0771)
    assert found.total == found.hardware + found.network + found.energy


def test_a_year_of_use_wears_what_a_year_of_age_takes():
    """Summed hour by hour the formula is the exponential that it comes from: 10^-0.14 a year."""
    hours = [lenses.owned("h100_sxm", 87.66, purchase=1.0, years_since_acquisition=i / 100 + 0.005)
             for i in range(100)]  # fmt: skip
    assert sum(h.hardware for h in hours) == pytest.approx(1 - 10**-0.14, rel=1e-4)


def test_owned_hardware_loses_value_and_energy_costs_the_same():
    new = lenses.owned("h800_sxm", 1e6)
    old = lenses.owned("h800_sxm", 1e6, years_since_acquisition=1.0)
    assert old.hardware == pytest.approx(new.hardware * 10**-0.14)
    assert old.energy == new.energy


def test_the_rate_and_the_lens_agree():
    """``cost.price_kind = 'owned'`` charges what the lens says of a new device."""
    for chip in ("h800_sxm", "h20", "b200", "mi300x", "tpu_v4", "rtx_4090"):
        rate = prices.resolve(chip, kind="owned", pue=1.3, dollars_per_kwh=0.1)
        lens = lenses.owned(chip, 123.0, pue=1.3, dollars_per_kwh=0.1)
        assert lenses.rental(123.0, rate) == pytest.approx(lens.total)


@pytest.mark.parametrize("chip", ["tpu_v6e", "cpu", "h100_nvl"])
def test_no_purchase_price_or_no_power_no_owned_lens(chip):
    assert lenses.owned(chip, 1.0) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"purchase": -1.0}, "purchase = -1.0: must be"),
        ({"purchase": math.nan}, "purchase = nan: must be"),
        ({"pue": 0.5}, r"cost\.pue = 0.5"),
        ({"dollars_per_kwh": -0.1}, r"cost\.dollars_per_kwh = -0.1"),
        ({"years_since_acquisition": -1.0}, "years_since_acquisition = -1.0"),
    ],
)
def test_bad_owners(changes, message):
    with pytest.raises(ConfigError, match=message):
        lenses.owned("h800_sxm", 1.0, **changes)


def test_headline_and_all_in_choose_runs():
    runs = [{"id": "a", "final": True}, {"id": "b", "final": False}]
    assert lenses.headline(runs) == runs[:1]
    assert lenses.all_in(runs) == runs
