"""Energy and carbon of device-hours, estimated from rated power, and labelled so.

What a machine's counters measure instead is ``moejax.cost.meter``'s.
"""

from moejax.config import ConfigError, check, nearest
from moejax.cost import grid
from moejax.cost import hardware as chips

SOURCE = "estimate"
# Dollars per kWh: average of US industry in 2024 (EIA, as in Epoch AI, training-cost-trends).
DOLLARS_PER_KWH = 0.0771


def kilowatts(hardware: str, pue: float | None = None) -> float | None:
    """Average power of one device with its share of server and data centre, kW.

    TDP x server multiplier x average power fraction x PUE (Epoch AI, training-cost-trends).

    Args:
      hardware: a chip's name.
      pue: power usage effectiveness of the data centre; None takes the chip's usual one.

    Returns:
      kW, or None where the chip's power is not published.

    Raises:
      ConfigError: no such chip, or a PUE below 1.
    """
    chip = chips.lookup(hardware)
    around = overhead(hardware, pue)
    if chip.tdp_watts is None:
        return None
    return chip.tdp_watts / 1000 * chip.power_fraction * around


def overhead(hardware: str, pue: float | None = None) -> float:
    """Energy at the data centre's meter over that of its chips: server multiplier x PUE.

    Args and errors: see ``kilowatts``.
    """
    chip = chips.lookup(hardware)
    if pue is None:
        return chip.server_multiplier * chip.pue
    check_pue(pue)
    return chip.server_multiplier * pue


def check_pue(pue: float) -> None:
    """Raises ConfigError unless a PUE is possible: from 1, and far below 10."""
    check(1 <= pue <= 10, "cost.pue", pue, "must be from 1 (a perfect data centre) to 10")


def kilowatt_hours(hardware: str, device_hours: float, pue: float | None = None) -> float | None:
    """Energy of device-hours, kWh; None where the chip's power is not published."""
    power = kilowatts(hardware, pue)
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
    if region not in grid.CARBON_KG_PER_KWH:
        hint = nearest(region, grid.CARBON_KG_PER_KWH)
        raise ConfigError("cost.region", region, f"no such region; {hint}")
    return grid.CARBON_KG_PER_KWH[region]
