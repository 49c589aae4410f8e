"""How good is a model at a task: pass@1, pass@k, majority@n, with intervals over problems.

Everything starts from ``correct``, one row a problem and one column a sample, and from the votes,
which are the canonical forms of the samples' answers. Each measure is a score a problem; its mean
over problems has a bootstrap interval in which problems are drawn, never single samples: samples of
one problem are not independent.

**What the interval knows.** It holds the training run fixed, and speaks of other problems of the
same kind. Two runs that differ in their seeds differ by more: compare several of each with
``moejax.analysis.statistics.compare``. A plain percentile bootstrap is too narrow with few
problems, by sqrt((n-1)/n) and for taking a normal tail where t's is right; the expanded percentile
interval used here (Hesterberg 2015, The American Statistician 69, 371-386, section 5.3) mends both,
and nothing mends a skewed score: with 20 problems and a rate near 0 or 1 it is still too narrow.
Where all problems score alike, resampling sees no spread at all, and the exact binomial bound takes
its place.
"""

import collections
import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from moejax.analysis.power import ALPHA, t_bound
from moejax.config import check

RESAMPLES = 4_000
_AT_ONCE = 4_000_000  # indices in memory


@dataclasses.dataclass(frozen=True)
class Measure:
    """A mean over problems.

    Attributes:
      mean: of the problems' scores.
      interval: for the mean, of confidence 1 - alpha.
      problems: how many.
    """

    mean: float
    interval: tuple[float, float]
    problems: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All measures of one model on one set of problems.

    Attributes:
      problems, samples: exact counts; ``samples`` a problem.
      pass_at: by k; k = 1 is the mean of all samples.
      majority: majority@samples.
      by_difficulty: pass@1 by level.
    """

    problems: int
    samples: int
    pass_at: dict[int, Measure]
    majority: Measure
    by_difficulty: dict[int, Measure]


def pass_at_k(correct: Bool[np.ndarray, "problems samples"], k: int) -> Float[np.ndarray, " p"]:
    """Chance that at least one of k samples is right, unbiased, a problem.

    1 - C(n-c, k) / C(n, k) with n samples of which c are right: the share of the subsets of k
    samples that hold a right one. Source: Chen et al. 2021, arXiv 2107.03374, equation 1. With
    k = 1 it is c / n.

    Args:
      correct: whether each sample is right.
      k: at most the number of samples; more would not be unbiased.

    Raises:
      ConfigError: a k that is not from 1 to n.
    """
    samples = _shape(correct)[1]
    check(1 <= k <= samples, "k", k, f"must be from 1 to the {samples} samples of a problem")
    wrong = samples - correct.sum(axis=1)
    # The product of (wrong - i) / (samples - i) over i < k; a factor of 0 makes the rest harmless.
    i = np.arange(k)
    none_right = np.prod(np.maximum(wrong[:, None] - i[None], 0) / (samples - i)[None], axis=1)
    return 1.0 - none_right


def majority_at_n(
    correct: Bool[np.ndarray, "problems samples"], votes: Sequence[Sequence[Hashable | None]]
) -> Float[np.ndarray, " problems"]:
    """Whether the most frequent answer is right, a problem.

    Samples without a readable answer (None) do not vote, and a problem without any vote scores 0.
    **Ties**: each of the answers in the lead counts in equal parts, which is the expectation of
    drawing lots between them, and depends on no order. An answer is as right as its samples are.

    Args:
      correct: whether each sample is right.
      votes: canonical answers, of the same shape; see ``Task.canonical``.

    Raises:
      ConfigError: votes of another shape.
    """
    problems, samples = _shape(correct)
    same = len(votes) == problems and all(len(row) == samples for row in votes)
    check(same, "votes", len(votes), f"must be {problems} rows of {samples}, as in `correct`")
    return np.array([_lead(row, rights) for row, rights in zip(votes, correct, strict=True)])


def _lead(votes: Sequence[Hashable | None], correct: Bool[np.ndarray, " samples"]) -> float:
    rights: dict[Hashable, list[bool]] = collections.defaultdict(list)
    for vote, right in zip(votes, correct.tolist(), strict=True):
        if vote is not None:
            rights[vote].append(right)
    most = max(map(len, rights.values()), default=0)
    leaders = [sum(given) / most for given in rights.values() if len(given) == most]
    return sum(leaders) / len(leaders) if leaders else 0.0


def measure(
    scores: Float[np.ndarray, " problems"],
    alpha: float = ALPHA,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Measure:
    """The mean of the problems' scores and its expanded percentile bootstrap interval.

    Args:
      scores: in [0, 1].
      alpha: error of the interval.
      seed: of the resampling.
      resamples: how many.

    Raises:
      ConfigError: no problem, or a score outside [0, 1].
    """
    scores = np.asarray(scores, np.float64)
    check(scores.size > 0, "problems", 0, "must be at least one")
    inside = bool(((scores >= 0) & (scores <= 1)).all())
    check(inside, "scores", float(scores.max()), "must lie from 0 to 1")
    mean, count = float(scores.mean()), len(scores)
    if np.ptp(scores) == 0:
        # Of n problems none differed from this score: with confidence 1 - alpha no more than a
        # share of 1 - alpha^(1/n) do, and those may score anything from 0 to 1.
        share = 1 - alpha ** (1 / count)
        return Measure(mean, (mean * (1 - share), mean * (1 - share) + share), count)
    low, high = _interval(scores, alpha, seed, resamples)
    return Measure(mean, (max(0.0, low), min(1.0, high)), count)


def _interval(
    scores: Float[np.ndarray, " n"], alpha: float, seed: int, resamples: int
) -> tuple[float, float]:
    """Expanded percentiles of the resampled means."""
    count = len(scores)
    rng = np.random.Generator(np.random.PCG64(seed))
    chunk = max(1, _AT_ONCE // count)
    means = np.concatenate(
        [
            scores[rng.integers(0, count, (min(chunk, resamples - done), count))].mean(axis=1)
            for done in range(0, resamples, chunk)
        ]
    )
    tail = float(special.ndtr(-np.sqrt(count / (count - 1)) * t_bound(alpha, count - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def difference(
    after: Float[np.ndarray, " problems"],
    before: Float[np.ndarray, " problems"],
    alpha: float = ALPHA,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Measure:
    """The mean gain of one model over another on the same problems, drawn in pairs.

    Args:
      after, before: scores in [0, 1] of the same problems in the same order.
      alpha, seed, resamples: as in ``measure``.

    Raises:
      ConfigError: different numbers of problems.
    """
    after, before = np.asarray(after, np.float64), np.asarray(before, np.float64)
    same = after.shape == before.shape
    check(same, "before", before.shape, f"must be scores of the same {len(after)} problems")
    halves = measure((after - before + 1) / 2, alpha, seed, resamples)
    low, high = (2 * bound - 1 for bound in halves.interval)
    return Measure(2 * halves.mean - 1, (low, high), halves.problems)


def evaluate(
    correct: Bool[np.ndarray, "problems samples"],
    votes: Sequence[Sequence[Hashable | None]],
    difficulties: Int[np.ndarray, " problems"] | Sequence[int],
    ks: Sequence[int] = (1,),
    alpha: float = ALPHA,
    seed: int = 0,
) -> Evaluation:
    """All measures at once; see ``pass_at_k``, ``majority_at_n`` and ``measure``.

    Args:
      correct: whether each sample is right.
      votes: canonical answers, None where there is none.
      difficulties: the problems' levels.
      ks: for pass@k; 1 is always there.
      alpha: error of each interval.
      seed: of the resampling.
    """
    problems, samples = _shape(correct)
    levels = np.asarray(difficulties)
    check(levels.shape == (problems,), "difficulties", len(levels), f"must be {problems} levels")
    first = pass_at_k(correct, 1)
    return Evaluation(
        problems,
        samples,
        {k: measure(pass_at_k(correct, k), alpha, seed) for k in sorted({1, *ks})},
        measure(majority_at_n(correct, votes), alpha, seed),
        {int(d): measure(first[levels == d], alpha, seed) for d in np.unique(levels)},
    )


def _shape(correct: Bool[np.ndarray, "problems samples"]) -> tuple[int, int]:
    """(problems, samples), both at least one."""
    full = correct.ndim == 2 and min(correct.shape) > 0 and correct.dtype == bool
    check(full, "correct", correct.shape, "must be True and False of shape (problems, samples)")
    return correct.shape
