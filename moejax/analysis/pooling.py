"""The error variance that variants share, and whether a pair may be judged by it.

Residual sums of squares of nested sets of variants differ by what the variant that is left out
adds, and the paired differences of two variants by what their contrast adds: independent under the
additive model, so that each F test here is exact.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

# A pair is judged by its own variance where one of three F tests finds at this level that it
# scatters more than the rest. A laxer level costs power where all is well, 5 to 10 points at 0.05.
DOUBT = 0.01
# A variant this improbably noisy (a diverging one) is kept out of the pool, for the others' sake.
GROSS = 0.001

Values = Mapping[str, Mapping[int, float]]  # variant -> seed -> value


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


def pooled_variance(values: Values) -> Pool:
    """The residual variance of the two-way model, without gross outliers and bit-equal variants.

    The quieter half of the variants is the core; the others join it, the quietest first, until an
    F test at the level ``GROSS`` over their number finds one too noisy: it and the noisier ones
    stay out. So several diverging variants cannot hide each other.
    """
    left_out: dict[str, str] = {}
    kept: list[str] = []
    for name in values:
        twin = next((k for k in kept if bit_equal(values[name], values[k])), None)
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


def doubt(
    values: Values, name: str, reference: str, pool: Pool, own: float, own_df: int
) -> str | None:
    """Why a pair should not be judged by the pool; None if it may be.

    Args:
      values: of all variants.
      name, reference: the pair.
      pool: of ``pooled_variance``.
      own: variance of one cell by the pair alone: half that of its differences.
      own_df: its degrees of freedom.
    """
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


def bit_equal(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Whether two variants have the same values at the same two or more seeds."""
    return len(one) > 1 and dict(one) == dict(other)


def paired(values: Values, one: str, other: str) -> Float[np.ndarray, " pairs"]:
    """Paired differences, one less other, at the seeds that both have."""
    seeds = [seed for seed in values[one] if seed in values[other]]
    return np.array([values[one][seed] - values[other][seed] for seed in seeds], float)


def _noise(values: Values, name: str, names: Sequence[str]) -> float:
    """Median variance of a variant's paired differences to the others; infinite without any."""
    pairs = [paired(values, name, other) for other in names if other != name]
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


def _f_tail(above: float, above_df: float, below: float, below_df: float) -> float:
    """P of an F so large or larger, for two variances."""
    if below == 0:
        return 1.0 if above == 0 else 0.0
    return float(special.fdtrc(above_df, below_df, above / below))
