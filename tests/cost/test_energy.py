"""Energy and carbon: Epoch's assumptions, by hand."""

import math

import pytest

from moejax.config import ConfigError
from moejax.cost import energy, grid


def test_an_h100_hour_by_hand():
    """0.7 kW x 1.82 (server) x 0.75 (average power) x 1.25 (PUE) = 1.194 kWh (Epoch AI)."""
    kwh = energy.kilowatt_hours("h100_sxm", 1000)
    assert kwh == pytest.approx(1194.375)
    assert energy.carbon_kg(kwh, "france") == pytest.approx(1194.375 * 0.056)


def test_a_tpu_has_a_hyperscalers_building():
    assert energy.kilowatts("tpu_v4") == pytest.approx(0.170 * 1.56 * 0.43 * 1.1)


def test_the_data_centre_is_a_choice():
    assert energy.kilowatts("h100_sxm", pue=1.1) == pytest.approx(0.7 * 1.82 * 0.75 * 1.1)
    assert energy.overhead("h100_sxm") == pytest.approx(1.82 * 1.25)
    assert energy.overhead("h100_sxm", 1.1) == pytest.approx(1.82 * 1.1)


@pytest.mark.parametrize("pue", [0.9, 0.0, -1.2, math.nan, math.inf, 110.0])
def test_impossible_data_centres(pue):
    with pytest.raises(ConfigError, match=r"cost\.pue = .*: must be from 1"):
        energy.kilowatts("h100_sxm", pue)


def test_unpublished_power_is_unknown_not_zero():
    kwh = energy.kilowatt_hours("tpu_v6e", 10.0)
    assert kwh is None
    assert energy.carbon_kg(kwh, "world") is None


# kg/kWh from codecarbon's tables for 2023, written down apart from the code.
FACTS = {
    "world": 0.475, "usa": 0.369, "china": 0.582, "france": 0.056, "germany": 0.381,
    "sweden": 0.041, "uk": 0.238, "india": 0.713,
}  # fmt: skip


@pytest.mark.parametrize("region", FACTS)
def test_the_grids_of_codecarbon(region):
    assert energy.carbon_factor(region) == FACTS[region]


def test_grids_are_plausible():
    """From hydropower to coal: 0.02 to 1.0 kg/kWh."""
    assert len(grid.CARBON_KG_PER_KWH) > 50
    assert all(0.02 < factor < 1.0 for factor in grid.CARBON_KG_PER_KWH.values())
    assert all(name == name.lower() and " " not in name for name in grid.CARBON_KG_PER_KWH)


def test_an_unknown_region_offers_the_nearest_even_without_energy():
    with pytest.raises(ConfigError, match=r"cost\.region = 'frnace': .* 'france'"):
        energy.carbon_kg(None, "frnace")
