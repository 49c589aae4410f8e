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
freedom: see ``compare``. Lower values are better throughout.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

from moejax.config import ConfigError, check

ALPHA, POWER = 0.05, 0.8
# A pair whose own variance is larger than the rest's at this level of an F test is judged by it.
DOUBT = 0.05
# A variant this improbably noisy (a diverging one) is kept out of the pool, for the others' sake.
GROSS = 0.001
MOST_SEEDS = 10_000

BETTER, WORSE, CANNOT_TELL = "better", "worse", "cannot tell"
Values = Mapping[str, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Pool:
    """The error variance that variants share.

    Attributes:
      sd: residual standard deviation of one cell, s; None where nothing is left to estimate it.
      df: its degrees of freedom.
      variants: names in it.
      left_out: why a variant is not in it, by name.
    """

    sd: float | None
    df: int
    variants: tuple[str, ...]
    left_out: dict[str, str]


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
      effect: what ``seeds_needed`` is for: the smallest effect of interest, else the seen one.
      seeds_needed: seeds to add so that ``effect`` is found with the wanted power, and
        ``seeds_needed_seen`` so that one of the seen size is; None where nobody can say.
      power: chance to find ``effect`` with these seeds added.
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
    power: float = POWER,
) -> Comparison:
    """Every variant against the reference, paired by seed, at a familywise error of ``alpha``.

    A pair is judged by its own variance, on its pairs less one degrees of freedom, where that is
    larger than the rest of the pool's at the level ``DOUBT`` of an F test, or where one of the two
    is not in the pool. Too small a variance of its own is left to the pool, which is the cautious
    side. Bit-equal variants count once in the pool, for their zero difference would shrink it.
    Variants that share fewer than two seeds with the reference, since cells failed, are compared
    unpaired (Welch), if both have two values.

    Args:
      values: value by seed, by variant; a missing or failed cell is left out. Lower is better.
      reference: the variant that the others are held against.
      smallest_effect: least difference of interest, in the values' unit.
      alpha: error over all comparisons together.
      power: wanted of the recommended number of seeds.

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


def pooled_variance(values: Values) -> Pool:
    """The residual variance of the two-way model, without gross outliers and bit-equal variants.

    The quieter half of the variants is the core; the others join it, the quietest first, until an
    F test at the level ``GROSS`` over their number finds one too noisy: it and the noisier ones
    stay out. So several diverging variants cannot hide each other.
    """
    left_out: dict[str, str] = {}
    kept: list[str] = []
    for name in values:
        twin = next((k for k in kept if _bit_equal(values[name], values[k])), None)
        if twin is None:
            kept.append(name)
        else:
            left_out[name] = f"bit-equal to {twin}"
    order = sorted(kept, key=lambda name: _noise(values, name, kept))
    members = order[: max(2, math.ceil(len(order) / 2))]
    for i in range(len(members), len(order)):
        before, after = _residual(values, order[:i]), _residual(values, order[: i + 1])
        more = after[1] - before[1]
        if more > 0 and before[1] > 0:
            p = _f_tail((after[0] - before[0]) / more, more, before[0] / before[1], before[1])
            if p < GROSS / len(order):
                for noisy in order[i:]:
                    left_out[noisy] = "its seeds scatter far more than the others'"
                break
        members = order[: i + 1]
    squares, df = _residual(values, members)
    ordered = tuple(name for name in values if name in members)
    return Pool(math.sqrt(squares / df) if df else None, df, ordered, left_out)


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
    bound, shift = _t_bound(alpha, df), abs(effect) / standard_error
    # Beyond, the chance is 1 to all digits, and the series no longer converges.
    if shift > bound + 40:
        return 1.0
    return float(1 - special.nctdtr(df, shift, bound) + special.nctdtr(df, shift, -bound))


def seeds_for(
    effect: float, sd: float, variants: int, *, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Least number of seeds at which an effect is found with the wanted power.

    Args:
      effect: true difference between two variants.
      sd: error of one cell, s of the two-way model.
      variants: in the pool, V: the test has (V-1)(S-1) degrees of freedom.
      alpha: level of the one test: the familywise one over the number of comparisons.
      power: chance of finding it.

    Returns:
      S, at least 2; None where it is above ``MOST_SEEDS``.
    """

    def enough(seeds: int) -> bool:
        error = sd * math.sqrt(2 / seeds)
        return power_of(effect, error, (variants - 1) * (seeds - 1), alpha) >= power

    low, high = 1, 2
    while not enough(high):
        low, high = high, high * 2
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def mean_interval(
    values: Float[np.ndarray, " n"], alpha: float = ALPHA
) -> tuple[float, float | None, tuple[float, float] | None]:
    """(mean, standard deviation, t interval) over seeds; the last two None of a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None, None
    sd = float(np.std(values, ddof=1))
    half = _t_bound(alpha, count - 1) * sd / math.sqrt(count)
    return mean, sd, (mean - half, mean + half)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    smallest: float | None
    alpha: float
    power: float
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


def _bit_equal(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    return len(one) > 1 and dict(one) == dict(other)


def _common(values: Values, one: str, other: str) -> Float[np.ndarray, " pairs"]:
    """Paired differences, one less other, at the seeds that both have."""
    seeds = [seed for seed in values[one] if seed in values[other]]
    return np.array([values[one][seed] - values[other][seed] for seed in seeds], float)


def _noise(values: Values, name: str, names: Sequence[str]) -> float:
    """Median variance of a variant's paired differences to the others; infinite without any."""
    pairs = [_common(values, name, other) for other in names if other != name]
    found = [np.var(pair, ddof=1) for pair in pairs if len(pair) > 1]
    return float(np.median(found)) if found else math.inf


def _residual(values: Values, names: Sequence[str]) -> tuple[float, int]:
    """(sum of squares, degrees of freedom) of the additive model's residuals, some variants."""
    cells = [(i, seed, values[v][seed]) for i, v in enumerate(names) for seed in values[v]]
    seeds = {seed: i for i, seed in enumerate(dict.fromkeys(seed for _, seed, _ in cells))}
    if not cells:
        return 0.0, 0
    y = np.array([value for *_, value in cells])
    y = y - y.mean()  # so that rounding is relative to the spread and not to the level
    if len(cells) == len(names) * len(seeds):  # none missing: the same, and faster
        order = [i * len(seeds) + seeds[seed] for i, seed, _ in cells]
        table = np.empty(len(cells))
        table[order] = y
        table = table.reshape(len(names), len(seeds))
        residuals = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True)
        return float((residuals**2).sum()), (len(names) - 1) * (len(seeds) - 1)
    design = np.zeros((len(cells), len(names) + len(seeds)))
    for row, (variant, seed, _) in enumerate(cells):
        design[row, variant] = design[row, len(names) + seeds[seed]] = 1
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    residuals = y - design @ solution
    return float(residuals @ residuals), len(cells) - int(rank)


def _t_bound(alpha: float, df: float) -> float:
    """What |t| exceeds with the chance alpha."""
    return -float(special.stdtrit(df, alpha / 2))


def _f_tail(above: float, above_df: float, below: float, below_df: float) -> float:
    """P of an F so large or larger, for two variances."""
    if below == 0:
        return 1.0 if above == 0 else 0.0
    return float(special.fdtrc(above_df, below_df, above / below))


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
    pair = _common(values, name, reference)
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
    if _bit_equal(values[name], values[reference]):
        return _Estimate(0.0, 0.0, len(pair) - 1, len(pair), "own", None,
                         ("bit-equal to the reference: the edit changed nothing",))  # fmt: skip
    own, own_df = float(np.var(pair, ddof=1)) / 2, len(pair) - 1
    reason = _doubt(values, name, reference, pool, own, own_df)
    if reason is None:
        variance, df, model = pool.sd**2, pool.df, "pooled"
    else:
        variance, df, model = own, own_df, "own"
        notes.append(reason)
    error = math.sqrt(2 * variance / len(pair))
    mean = float(pair.mean())
    return _Estimate(mean, error, df, len(pair), model, math.sqrt(variance), tuple(notes))


def _doubt(
    values: Values, name: str, reference: str, pool: Pool, own: float, own_df: int
) -> str | None:
    """Why a pair should not be judged by the pool; None if it may be."""
    for member in (name, reference):
        if member not in pool.variants:
            twin = pool.left_out[member].removeprefix("bit-equal to ")
            if twin in pool.variants:
                continue  # the pool knows it under the other's name
            return f"own variance: {member}: {pool.left_out[member]}"
    for member in (name, reference):
        if _noisier(values, _known_as(pool, member), pool):
            return f"own variance: {member} scatters more than the others (F test)"
    members = {_known_as(pool, name), _known_as(pool, reference)}
    if len(members) < 2 or pool.df <= own_df:
        return None
    # Paired differences and what is left of the residuals are independent: an exact F test.
    rest_df = pool.df - own_df
    rest = max(0.0, pool.sd**2 * pool.df - own * own_df) / rest_df
    p = _f_tail(own, own_df, rest, rest_df)
    if p >= DOUBT:
        return None
    return f"own variance: its paired differences scatter more than the others' (F test, p {p:.2g})"


def _noisier(values: Values, name: str, pool: Pool) -> bool:
    """Whether a member's errors are larger than the other members', by an F test."""
    others = [member for member in pool.variants if member != name]
    squares, df = _residual(values, others)
    more = pool.df - df
    if not df or not more:
        return False
    p = _f_tail((pool.sd**2 * pool.df - squares) / more, more, squares / df, df)
    return p < DOUBT


def _known_as(pool: Pool, name: str) -> str:
    return pool.left_out.get(name, name).removeprefix("bit-equal to ")


def _unpaired(values: Values, name: str, reference: str, pairs: int) -> _Estimate:
    """Welch's comparison where failed cells left fewer than two common seeds."""
    ours, theirs = (np.array(list(values[v].values()), float) for v in (name, reference))
    if min(len(ours), len(theirs)) < 2:
        mean = float(_common(values, name, reference).mean()) if pairs else None
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
        half = _t_bound(wanted.alpha, found.df) * found.error
        interval = (found.mean - half, found.mean + half)
        if p_holm <= wanted.alpha and found.mean != 0:
            verdict = BETTER if found.mean < 0 else WORSE
    effect = wanted.smallest or (abs(found.mean) if found.mean else None)
    needed = seen = chance = None
    if verdict == CANNOT_TELL and found.cell_sd:
        needed, chance = _more_seeds(effect, found, wanted, pool)
        seen, _ = _more_seeds(abs(found.mean) if found.mean else None, found, wanted, pool)
    return Difference(
        found.mean, interval, found.error, found.df, found.pairs, p,
        None if p is None else p_holm, found.model, verdict, effect, needed, seen, chance,
        found.notes,
    )  # fmt: skip


def _more_seeds(
    effect: float | None, found: _Estimate, wanted: _Wanted, pool: Pool
) -> tuple[int | None, float | None]:
    """(seeds to add, power with them): Holm's strictest step, alpha over the comparisons."""
    if effect is None:
        return None, None
    variants = len(pool.variants) if found.model == "pooled" else 2
    alpha = wanted.alpha / wanted.comparisons
    total = seeds_for(effect, found.cell_sd, variants, alpha=alpha, power=wanted.power)
    if total is None:
        return None, None
    seeds = max(total, found.pairs, 2)
    error = found.cell_sd * math.sqrt(2 / seeds)
    return seeds - found.pairs, power_of(effect, error, (variants - 1) * (seeds - 1), alpha)


def verdict_text(found: Difference) -> str:
    """The verdict as one sentence: 'cannot tell at this budget: 3 more seeds needed'."""
    if found.verdict != CANNOT_TELL:
        return f"{found.verdict} by {abs(found.mean):.3g}"
    head = "cannot tell at this budget"
    if found.p is None:
        return f"{head}: both need two seeds that finished"
    if found.effect is None or found.standard_error == 0:
        return f"{head}: no difference was seen"
    what = f"an effect of {found.effect:.3g} is found in {found.power or POWER:.0%} of such grids"
    if found.seeds_needed is None:
        return f"{head}: more than {MOST_SEEDS:,} seeds needed for an effect of {found.effect:.3g}"
    if found.seeds_needed == 0:
        return f"{head}: 0 more seeds needed: already now {what}"
    plural = "seed" if found.seeds_needed == 1 else "seeds"
    return f"{head}: {found.seeds_needed} more {plural} needed (then {what})"
