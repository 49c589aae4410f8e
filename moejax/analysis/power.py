"""Power of a t test, and the seeds that it takes."""

import math

import numpy as np
from scipy import special

ALPHA, POWER = 0.05, 0.8
MOST_SEEDS = 10_000
PRACTICAL_SEEDS = 100  # more are advised to nobody
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_QUANTILES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def t_bound(alpha: float, df: float) -> float:
    """What |t| exceeds with the chance alpha."""
    return -float(special.stdtrit(df, alpha / 2))


def power_of(effect: float, standard_error: float, df: float, alpha: float) -> float:
    """Chance that a two-sided t test finds an effect (noncentral t).

    Args:
      effect: true difference.
      standard_error: true standard error of its estimate.
      df: degrees of freedom of the test's variance.
      alpha: level of the one test.
    """
    if standard_error == 0:
        return 1.0 if effect else alpha
    return float(_power(np.array([abs(effect) / standard_error]), df, alpha)[0])


def _power(shifts: np.ndarray, df: float, alpha: float) -> np.ndarray:
    # |t| > bound is F > bound², of one degree of freedom and the shift squared.
    missed = special.ncfdtr(1, df, shifts**2, t_bound(alpha, df) ** 2)
    return np.where(np.isnan(missed), 1.0, 1 - missed)  # not a number only where it underflows


def grid_power(
    effect: float, sd: float, sd_df: float, seeds: int, variants: int, alpha: float
) -> float:
    """Chance to find an effect in a grid to come, the error being known from a grid that was.

    The estimate s of the error is itself uncertain, and a few seeds more often put it too low than
    too high. So the power is averaged over what the error may be, s² sd_df / chi²(sd_df).

    Args:
      effect: true difference between two variants.
      sd: estimated error of one cell, s.
      sd_df: degrees of freedom of s; infinite where it is known.
      seeds: S of the grid to come.
      variants: in its pool, V: its tests have (V-1)(S-1) degrees of freedom.
      alpha: level of the one test: the familywise one over the number of comparisons.
    """
    ratios = np.ones(1) if math.isinf(sd_df) else special.chdtri(sd_df, _QUANTILES) / sd_df
    weights = np.ones(1) if math.isinf(sd_df) else _WEIGHTS
    if sd == 0:
        return 1.0
    shifts = abs(effect) / sd * np.sqrt(seeds / 2 * ratios)
    return float(weights @ _power(shifts, (variants - 1) * (seeds - 1), alpha))


def seeds_for(
    effect: float,
    sd: float,
    variants: int,
    *,
    sd_df: float = math.inf,
    alpha: float = ALPHA,
    power: float = POWER,
) -> int | None:
    """Least number of seeds at which ``grid_power`` is as wanted.

    Args:
      effect, sd, variants, sd_df, alpha: see ``grid_power``.
      power: chance of finding the effect.

    Returns:
      S, at least 2; None where it is above ``MOST_SEEDS``.
    """
    enough = lambda seeds: grid_power(effect, sd, sd_df, seeds, variants, alpha) >= power
    # Where the error is known and the test normal, this many are enough; the search starts there.
    normal = special.ndtri(1 - alpha / 2) + special.ndtri(power)
    high = 2 * math.ceil(min(max(2 * (normal * sd / effect) ** 2, 2.0), MOST_SEEDS / 2) / 2)
    while not enough(high):
        high *= 2
        if high > MOST_SEEDS:
            return None
    low = high // 2
    while low > 1 and enough(low):
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
