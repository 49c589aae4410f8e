"""What a device-hour costs the device's owner: Epoch AI's amortised formula.

Source: Epoch AI, training-cost-trends (arXiv 2405.21015): hardware loses 0.14 orders of magnitude
of its value a year, 19 % of a cluster's cost is its network, and energy comes on top.
"""

import math

DEPRECIATION = 0.14  # orders of magnitude of the price a year
NETWORK_SHARE = 0.19  # of the cost of a cluster
HOURS_PER_YEAR = 8766


def hardware_dollars_per_hour(
    purchase_dollars: float, years_since_acquisition: float = 0.0
) -> float:
    """Value that one device loses in an hour, US dollars, network and energy left out.

    Args:
      purchase_dollars: price of one device when it was new.
      years_since_acquisition: its age.
    """
    value = purchase_dollars * 10 ** (-DEPRECIATION * years_since_acquisition)
    return value * DEPRECIATION * math.log(10) / HOURS_PER_YEAR


def network_dollars_per_hour(hardware_dollars: float) -> float:
    """A device's share of the network, US dollars, for so many dollars of its own."""
    return hardware_dollars * NETWORK_SHARE / (1 - NETWORK_SHARE)
