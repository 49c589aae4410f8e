"""pass@k, majority@n and bootstrap intervals against enumeration, closed forms and coverage."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moejax.analysis.power import t_bound
from moejax.config import ConfigError
from moejax.reasoning import evaluate

grids = hnp.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 7)))


@settings(max_examples=80, deadline=None)
@given(grids, st.data())
def test_pass_at_k_is_the_share_of_subsets(correct, data):
    k = data.draw(st.integers(1, correct.shape[1]))
    expected = [
        np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in correct
    ]
    np.testing.assert_allclose(evaluate.pass_at_k(correct, k), expected, atol=1e-12)


def test_pass_at_k_of_many_samples():
    """Binomials that overflow floats: 1 - C(900, 100) / C(1000, 100), in whole numbers."""
    correct = np.arange(1000)[None] < 100
    exact = 1 - math.comb(900, 100) / math.comb(1000, 100)
    assert evaluate.pass_at_k(correct, 100)[0] == pytest.approx(exact, rel=1e-12)
    assert evaluate.pass_at_k(correct, 1)[0] == pytest.approx(0.1)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_beyond_the_samples(k):
    with pytest.raises(ConfigError, match=rf"k = {k}: must be from 1 to the 4 samples"):
        evaluate.pass_at_k(np.ones((2, 4), bool), k)


votes = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(votes, st.sets(st.sampled_from("abc")))
def test_majority_is_the_mean_over_drawn_lots(row, right):
    """Every order of the votes, the first of the most frequent answers taken."""
    correct = np.array([[vote in right for vote in row]])
    cast = [vote for vote in row if vote is not None]
    orders = itertools.permutations(sorted(set(cast)))
    chosen = [max(order, key=cast.count) for order in orders if order]
    expected = np.mean([vote in right for vote in chosen]) if chosen else 0.0
    assert evaluate.majority_at_n(correct, [row])[0] == pytest.approx(expected)
    turned = [row[::-1]]
    assert evaluate.majority_at_n(correct[:, ::-1], turned)[0] == pytest.approx(expected)


def test_majority_by_hand():
    # 7 7 3: 7 leads and is right. 7 3: a tie, half. None None 3: only 3 votes, wrong. None: 0.
    rows = [["7", "7", "3"], ["7", "3", None], [None, None, "3"], [None, None, None]]
    correct = np.array([[vote == "7" for vote in row] for row in rows])
    np.testing.assert_array_equal(evaluate.majority_at_n(correct, rows), [1, 0.5, 0, 0])
    with pytest.raises(ConfigError, match="must be 4 rows of 3"):
        evaluate.majority_at_n(correct, rows[:3])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(float, st.integers(1, 30), elements=st.floats(0, 1)), st.integers(0, 5))
def test_intervals_hold_their_mean(scores, seed):
    found = evaluate.measure(scores, seed=seed, resamples=300)
    low, high = found.interval
    assert found.mean == pytest.approx(scores.mean()) and found.problems == len(scores)
    # The mean of rounded numbers can differ from all of them in the last place.
    assert 0 <= low <= found.mean + 1e-9 and found.mean - 1e-9 <= high <= 1
    assert found == evaluate.measure(scores, seed=seed, resamples=300)


def test_the_interval_is_every_resample_of_three():
    """All 27 resamples of three problems, each equally likely, against 200,000 drawn ones."""
    scores, alpha = np.array([0.0, 0.25, 1.0]), 0.8
    means = np.sort([np.mean(drawn) for drawn in itertools.product(scores, repeat=3)])
    expanded = -math.sqrt(3 / 2) * t_bound(alpha, 2)
    tail = 0.5 * math.erfc(-expanded / math.sqrt(2))
    expected = [means[math.ceil(q * 27) - 1] for q in (tail, 1 - tail)]
    low, high = evaluate.measure(scores, alpha, resamples=200_000).interval
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-9)


def test_many_problems_come_to_the_normal_interval():
    scores = (np.arange(2000) % 10 < 3).astype(float)
    found = evaluate.measure(scores)
    half = 1.96 * math.sqrt(0.21 / 2000)
    assert found.interval == pytest.approx((0.3 - half, 0.3 + half), abs=0.002)


@pytest.mark.parametrize(("score", "count"), [(0.0, 30), (1.0, 30), (0.5, 8), (0.0, 1)])
def test_scores_that_are_all_alike_have_an_interval(score, count):
    found = evaluate.measure(np.full(count, score))
    share = 1 - 0.05 ** (1 / count)  # for 30 problems 9.5 %, near the "rule of three" 3/n = 10 %
    low, high = found.interval
    assert found.mean == score and high - low == pytest.approx(share)


def test_coverage():
    """Share of 95 % intervals that hold the truth, 400 draws each; the draws are fixed.

    The binomial standard deviation of such a share is 1.1 points.
    """
    rng = np.random.default_rng(0)
    for problems, rate, least in ((30, 0.5, 0.92), (60, 0.2, 0.92), (100, 0.7, 0.92)):
        held = 0
        for trial in range(400):
            scores = (rng.random(problems) < rate).astype(float)
            low, high = evaluate.measure(scores, seed=trial, resamples=400).interval
            held += low <= rate <= high
        assert held / 400 >= least, (problems, rate, held)


def test_a_difference_is_paired():
    rng = np.random.default_rng(1)
    before = rng.random(50) * 0.5
    after = before + 0.1
    gain = evaluate.difference(after, before)
    assert gain.mean == pytest.approx(0.1)
    assert gain.interval[0] <= 0.1 <= gain.interval[1]
    noise = evaluate.difference(np.clip(before + rng.normal(0, 0.02, 50), 0, 1), before)
    width = noise.interval[1] - noise.interval[0]
    assert noise.interval[0] < 0 < noise.interval[1] and width < 0.02
    with pytest.raises(ConfigError, match="scores of the same 50 problems"):
        evaluate.difference(after, before[:10])


def test_all_at_once():
    correct = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]], bool)
    said = [["4", "4", "5"], ["1", None, "2"], ["7", "8", "8"], ["9", "9", "9"]]
    found = evaluate.evaluate(correct, said, [1, 1, 2, 2], ks=(2,))
    assert (found.problems, found.samples, list(found.pass_at)) == (4, 3, [1, 2])
    assert found.pass_at[1].mean == pytest.approx((2 / 3 + 0 + 1 / 3 + 1) / 4)
    assert found.pass_at[2].mean == pytest.approx((1 + 0 + 2 / 3 + 1) / 4)
    assert found.majority.mean == pytest.approx(2 / 4)
    assert {level: found.by_difficulty[level].mean for level in (1, 2)} == pytest.approx(
        {1: 1 / 3, 2: 2 / 3}
    )
    assert found.by_difficulty[1].problems == 2


@pytest.mark.parametrize(
    ("correct", "message"),
    [(np.ones(3, bool), "correct = "), (np.ones((0, 3), bool), "correct = "),
     (np.ones((2, 2)), "must be True and False")],
)  # fmt: skip
def test_shapes_that_cannot_be_used(correct, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.pass_at_k(correct, 1)
    with pytest.raises(ConfigError, match="must lie from 0 to 1"):
        evaluate.measure(np.array([0.0, 1.5]))
    with pytest.raises(ConfigError, match="must be at least one"):
        evaluate.measure(np.zeros(0))
