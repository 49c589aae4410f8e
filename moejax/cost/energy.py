"""Energy and carbon of device-hours: estimates from rated power, and labelled so."""

from moejax.config import ConfigError, nearest
from moejax.cost import hardware as chips

SOURCE = "estimate"

# kg CO2 per kWh of a grid; codecarbon's tables for 2023.
CARBON_KG_PER_KWH: dict[str, float] = {
    "world": 0.475,
    "china": 0.582,
    "france": 0.056,
    "germany": 0.381,
    "india": 0.713,
    "sweden": 0.041,
    "uk": 0.238,
    "usa": 0.369,
}
# Dollars per kWh, 2024 (Epoch AI, training-cost-trends).
DOLLARS_PER_KWH = 0.0771


def kilowatts(hardware: str) -> float | None:
    """Average power of one device with its share of server and data centre, kW.

    TDP x server multiplier x average power fraction x PUE (Epoch AI, training-cost-trends).

    Returns:
      kW, or None where the chip's power is not published.

    Raises:
      ConfigError: no such chip.
    """
    chip = chips.lookup(hardware)
    if chip.tdp_watts is None:
        return None
    return chip.tdp_watts / 1000 * chip.server_multiplier * chip.power_fraction * chip.pue


def kilowatt_hours(hardware: str, device_hours: float) -> float | None:
    """Energy of device-hours, kWh; None where the chip's power is not published."""
    power = kilowatts(hardware)
    return None if power is None else power * device_hours


def carbon_kg(kwh: float | None, region: str) -> float | None:
    """Carbon of an amount of energy on a region's grid, kg CO2; None where the energy is.

    Raises:
      ConfigError: no such region; the nearest is offered.
    """
    factor = carbon_factor(region)
    return None if kwh is None else kwh * factor


def carbon_factor(region: str) -> float:
    """kg CO2 per kWh of a region's grid.

    Raises:
      ConfigError: no such region; the nearest is offered.
    """
    if region not in CARBON_KG_PER_KWH:
        hint = nearest(region, CARBON_KG_PER_KWH)
        raise ConfigError("cost.region", region, f"no such region; {hint}")
    return CARBON_KG_PER_KWH[region]
