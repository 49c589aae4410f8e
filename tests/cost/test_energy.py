"""Energy and carbon: Epoch's assumptions, by hand."""

import pytest

from moejax.config import ConfigError
from moejax.cost import energy


def test_an_h100_hour_by_hand():
    """0.7 kW x 1.82 (server) x 0.75 (average power) x 1.25 (PUE) = 1.194 kWh (Epoch AI)."""
    kwh = energy.kilowatt_hours("h100_sxm", 1000)
    assert kwh == pytest.approx(1194.375)
    assert energy.carbon_kg(kwh, "france") == pytest.approx(1194.375 * 0.056)


def test_a_tpu_has_a_hyperscalers_building():
    assert energy.kilowatts("tpu_v4") == pytest.approx(0.170 * 1.56 * 0.43 * 1.1)


def test_unpublished_power_is_unknown_not_zero():
    kwh = energy.kilowatt_hours("tpu_v6e", 10.0)
    assert kwh is None
    assert energy.carbon_kg(kwh, "world") is None


def test_an_unknown_region_offers_the_nearest_even_without_energy():
    with pytest.raises(ConfigError, match=r"cost\.region = 'frnace': .* 'france'"):
        energy.carbon_kg(None, "frnace")
