"""Is a variant better than the reference, or did it have luck with its seeds?

The variants of a grid share their seeds, hence the order of their data and the start of their
common weights, so that a seed is good or bad for all of them. The model is additive in both ways,

    value[v, s] = variant[v] + seed[s] + error[v, s],   errors normal, independent, of one variance

and is fitted by least squares to the cells that there are. With V variants and S seeds, no cell
missing, the residual variance s² has (V-1)(S-1) degrees of freedom, and a difference to the
reference, the mean over S seeds of the paired differences, has the variance 2 s²/S, independent of
s². So each difference over its standard error is exactly t with (V-1)(S-1) degrees of freedom. The
differences share the reference and s², and are correlated; Holm's correction holds the familywise
error whatever the correlation. Pooling the V-1 variances of paired differences as if they were
independent would count (V-1)(S-1) degrees of freedom too, but the reference's errors V-1 times
over; two-way residuals count each error once.

Where one variance for all is in doubt, a pair gets a variance of its own, of S-1 degrees of
freedom: see ``doubt`` in ``pooling``. Lower values are better throughout.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

from moejax.analysis.pooling import Pool, Values, bit_equal, doubt, paired, pooled_variance
from moejax.analysis.power import (
    ALPHA,
    POWER,
    PRACTICAL_SEEDS,
    grid_power,
    seeds_for,
    t_bound,
)
from moejax.config import ConfigError, check

BETTER, WORSE, CANNOT_TELL = "better", "worse", "cannot tell"


@dataclasses.dataclass(frozen=True)
class Difference:
    """A variant's value less the reference's.

    Attributes:
      mean: over the seeds that both have; None where there is no such seed, nor an unpaired way.
      interval: of confidence 1 - alpha for this one difference, not corrected for the others.
      standard_error: of the mean.
      df: degrees of freedom of the standard error; whole unless unpaired.
      pairs: seeds that both have.
      p: two-sided, of this comparison alone.
      p_holm: corrected for all comparisons with the reference.
      model: 'pooled', 'own' (this pair's own variance), 'unpaired' or 'none'.
      verdict: 'better', 'worse' or 'cannot tell'.
      smallest_effect: of interest, as given.
      effect: what ``seeds_needed`` is for: the smallest effect of interest, else the seen one.
      seeds_needed: of a 'cannot tell': seeds to add to ``pairs`` for a grid of so many to find
        ``effect`` with the wanted power, and ``seeds_needed_seen`` one of the seen size; None where
        nobody can say. Testing the old seeds again together with the added ones is a second look,
        which spends more than the familywise error: see experiments/results/statistics.
      power: chance that a grid of ``pairs`` and ``seeds_needed`` seeds finds ``effect``.
      notes: what the reader has to know of this comparison.
    """

    mean: float | None
    interval: tuple[float, float] | None
    standard_error: float | None
    df: float
    pairs: int
    p: float | None
    p_holm: float | None
    model: str
    verdict: str
    smallest_effect: float | None
    effect: float | None
    seeds_needed: int | None
    seeds_needed_seen: int | None
    power: float | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All variants against the reference.

    Attributes:
      pool: the shared error variance.
      differences: by variant, without the reference.
      alpha: familywise error over all of them.
    """

    pool: Pool
    differences: dict[str, Difference]
    alpha: float


def compare(
    values: Values,
    reference: str,
    *,
    smallest_effect: float | None = None,
    alpha: float = ALPHA,
    power: float | None = POWER,
) -> Comparison:
    """Every variant against the reference, paired by seed, at a familywise error of ``alpha``.

    A pair is judged by its own variance, on its pairs less one degrees of freedom, where an F test
    finds that its differences, or one of the two variants, scatter more than the rest, or where one
    of the two is too noisy for the pool. A variance of its own that is smaller is left to the pool,
    which is the cautious side. Bit-equal variants count once in the pool, for their zero difference
    would shrink it. Variants that share fewer than two seeds with the reference, since cells
    failed, are compared unpaired (Welch), if both have two values.

    Args:
      values: value by seed, by variant; a missing or failed cell is left out. Lower is better.
      reference: the variant that the others are held against.
      smallest_effect: least difference of interest, in the values' unit.
      alpha: error over all comparisons together.
      power: wanted of the recommended number of seeds; None recommends none.

    Raises:
      ConfigError: an unknown reference, a value that is not finite, or no variant to compare.
    """
    _check(values, reference, smallest_effect)
    pool = pooled_variance(values)
    names = [name for name in values if name != reference]
    found = [_estimate(values, name, reference, pool) for name in names]
    ps = [_p_value(estimate) for estimate in found]
    corrected = holm([1.0 if p is None else p for p in ps])
    wanted = _Wanted(smallest_effect, alpha, power, len(names))
    judged = [
        _judged(estimate, p, p_holm, wanted, pool)
        for estimate, p, p_holm in zip(found, ps, corrected, strict=True)
    ]
    return Comparison(pool, dict(zip(names, judged, strict=True)), alpha)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down p-values: the familywise error is held however the tests depend.

    Args:
      ps: of the family's tests.

    Returns:
      Corrected p-values in the same order. Source: Holm 1979, Scand. J. Statist. 6, 65-70.
    """
    order = np.argsort(ps)
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def mean_interval(
    values: Float[np.ndarray, " n"], alpha: float = ALPHA
) -> tuple[float, float | None, tuple[float, float] | None]:
    """(mean, standard deviation, t interval) over seeds; the last two None of a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None, None
    sd = float(np.std(values, ddof=1))
    half = t_bound(alpha, count - 1) * sd / math.sqrt(count)
    return mean, sd, (mean - half, mean + half)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    smallest: float | None
    alpha: float
    power: float | None
    comparisons: int


def _check(values: Values, reference: str, smallest_effect: float | None) -> None:
    check(reference in values, "reference", reference, f"is no variant; known: {', '.join(values)}")
    check(len(values) > 1, "variants", len(values), "give at least one beside the reference")
    if smallest_effect is not None:
        check(smallest_effect > 0, "smallest_effect", smallest_effect, "must be above zero")
    for name, by_seed in values.items():
        for seed, value in by_seed.items():
            if not math.isfinite(value):
                raise ConfigError(
                    f"variants.{name}", value, f"seed {seed} is not finite; leave failed cells out"
                )


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """A difference before its verdict; ``cell_sd`` is the error of one cell, for the power."""

    mean: float | None
    error: float | None
    df: float
    pairs: int
    model: str
    cell_sd: float | None
    notes: tuple[str, ...] = ()


def _estimate(values: Values, name: str, reference: str, pool: Pool) -> _Estimate:
    pair = paired(values, name, reference)
    notes = []
    missing = len(set(values[name]) ^ set(values[reference]))
    if len(pair) < 2:
        return _unpaired(values, name, reference, len(pair))
    if missing:
        what = (
            "1 seed that only one of the two finished is"
            if missing == 1
            else (f"{missing} seeds that only one of the two finished are")
        )
        notes.append(f"{what} left out: this speaks of the seeds that both finished")
    if bit_equal(values[name], values[reference]):
        return _Estimate(0.0, 0.0, len(pair) - 1, len(pair), "own", None,
                         ("bit-equal to the reference: the edit changed nothing",))  # fmt: skip
    own, own_df = float(np.var(pair, ddof=1)) / 2, len(pair) - 1
    reason = doubt(values, name, reference, pool, own, own_df)
    if reason is None:
        variance, df, model = pool.sd**2, pool.df, "pooled"
    else:
        variance, df, model = own, own_df, "own"
        notes.append(reason)
    error = math.sqrt(2 * variance / len(pair))
    mean = float(pair.mean())
    return _Estimate(mean, error, df, len(pair), model, math.sqrt(variance), tuple(notes))


def _unpaired(values: Values, name: str, reference: str, pairs: int) -> _Estimate:
    """Welch's comparison where failed cells left fewer than two common seeds."""
    ours, theirs = (np.array(list(values[v].values()), float) for v in (name, reference))
    if min(len(ours), len(theirs)) < 2:
        mean = float(paired(values, name, reference).mean()) if pairs else None
        note = "fewer than two seeds finished in one of the two: nothing can be said"
        return _Estimate(mean, None, 0, pairs, "none", None, (note,))
    parts = [float(np.var(x, ddof=1)) / len(x) for x in (ours, theirs)]
    error = math.sqrt(sum(parts))
    degrees = [part**2 / (len(x) - 1) for part, x in zip(parts, (ours, theirs), strict=True)]
    df = sum(parts) ** 2 / sum(degrees) if sum(degrees) else len(ours) + len(theirs) - 2
    cell = math.sqrt(float(np.var(ours, ddof=1) + np.var(theirs, ddof=1)) / 2)
    note = "unpaired (Welch): cells failed, and fewer than two seeds are common"
    mean = float(ours.mean() - theirs.mean())
    return _Estimate(mean, error, df, pairs, "unpaired", cell, (note,))


def _p_value(estimate: _Estimate) -> float | None:
    if estimate.error is None:
        return None
    if estimate.error == 0:
        return 1.0 if estimate.mean == 0 else 0.0
    return float(2 * special.stdtr(estimate.df, -abs(estimate.mean) / estimate.error))


def _judged(
    found: _Estimate, p: float | None, p_holm: float, wanted: _Wanted, pool: Pool
) -> Difference:
    verdict, interval = CANNOT_TELL, None
    if p is not None:
        half = t_bound(wanted.alpha, found.df) * found.error
        interval = (found.mean - half, found.mean + half)
        if p_holm <= wanted.alpha and found.mean != 0:
            verdict = BETTER if found.mean < 0 else WORSE
    effect = wanted.smallest or (abs(found.mean) if found.mean else None)
    needed = seen = chance = None
    if verdict == CANNOT_TELL and found.cell_sd and wanted.power:
        needed, chance = _more_seeds(effect, found, wanted, pool)
        seen, _ = _more_seeds(abs(found.mean) if found.mean else None, found, wanted, pool)
    return Difference(
        found.mean, interval, found.error, found.df, found.pairs, p,
        None if p is None else p_holm, found.model, verdict, wanted.smallest, effect, needed,
        seen, chance, found.notes,
    )  # fmt: skip


def _more_seeds(
    effect: float | None, found: _Estimate, wanted: _Wanted, pool: Pool
) -> tuple[int | None, float | None]:
    """(seeds to add, power with them): at Holm's strictest step, alpha over the comparisons."""
    if effect is None:
        return None, None
    variants = len(pool.variants) if found.model == "pooled" else 2
    alpha = wanted.alpha / wanted.comparisons
    sd, df = found.cell_sd, found.df
    total = seeds_for(effect, sd, variants, sd_df=df, alpha=alpha, power=wanted.power)
    if total is None:
        return None, None
    seeds = max(total, found.pairs, 2)
    return seeds - found.pairs, grid_power(effect, sd, df, seeds, variants, alpha)


def verdict_text(found: Difference) -> str:
    """The verdict as one sentence: 'cannot tell at this budget: 3 more seeds needed (...)'.

    Where more than ``PRACTICAL_SEEDS`` would be needed, it says instead what is known already: the
    interval, and whether it leaves room for a difference of interest.
    """
    if found.verdict != CANNOT_TELL:
        small = found.smallest_effect and abs(found.mean) < found.smallest_effect
        less = f", less than the {found.smallest_effect:g} of interest" if small else ""
        return f"{found.verdict} by {abs(found.mean):.3g}{less}"
    return f"cannot tell at this budget: {_open_text(found)}"


def _open_text(found: Difference) -> str:
    if found.p is None:
        return "both need two seeds that finished"
    if found.effect is None or found.standard_error == 0:
        return "no difference was seen"
    low, high = found.interval
    within = f"the interval is {low:+.3g} to {high:+.3g}"
    if low > 0 or high < 0:
        within += ", without zero, which is not enough among several comparisons"
    smallest, seen = found.smallest_effect, found.seeds_needed_seen
    if smallest and -smallest < low and high < smallest:
        return f"{within}, and leaves out differences of {smallest:g} or more"
    effect = f"an effect of {smallest:g}" if smallest else f"the seen {found.effect:.3g}, if real,"
    if found.seeds_needed is None or found.pairs + found.seeds_needed > PRACTICAL_SEEDS:
        return f"{effect} would take more than {PRACTICAL_SEEDS} seeds to be found; {within}"
    if not found.seeds_needed:
        text = (
            f"{found.pairs} seeds would find {effect} in {100 * found.power:.0f} % of grids; "
            f"{within}"
        )
    else:
        plural = "seed" if found.seeds_needed == 1 else "seeds"
        total = found.pairs + found.seeds_needed
        text = (
            f"{found.seeds_needed} more {plural} needed ({total} in all find {effect} in "
            f"{100 * found.power:.0f} % of grids)"
        )
    if smallest and seen and found.pairs + seen <= PRACTICAL_SEEDS:
        text += f"; {seen} more if the seen {abs(found.mean):.3g} is real"
    return text
