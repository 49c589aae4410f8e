"""Verdicts on made grids whose truth is known; rates over many of them."""

import dataclasses
import importlib.util
import math
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moejax.analysis import pooling, power, statistics
from moejax.analysis.statistics import compare, holm, verdict_text
from moejax.config import ConfigError

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "launch" / "check_statistics.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_statistics", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(rows, first=0):
    return {f"v{i}": dict(enumerate(map(float, row), start=first)) for i, row in enumerate(rows)}


def test_two_variants_are_a_paired_t_test():
    random = np.random.default_rng(0)
    ours, theirs = random.standard_normal((2, 6)) + random.standard_normal(6)[None] * 9
    found = compare(table([theirs, ours]), "v0").differences["v1"]
    expected = stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(expected.pvalue) and found.p_holm == found.p
    assert found.df == 5 and found.pairs == 6
    interval = expected.confidence_interval()
    assert found.interval == pytest.approx((interval.low, interval.high))


def test_the_pool_is_the_two_way_residual():
    # Variants (0, 1, 2) + seeds (0, 10) + errors ±(1, 0.5, -1.5). The errors are the residuals, of
    # squares 2 (1 + 0.25 + 2.25) = 7 on (3-1)(2-1) = 2 degrees of freedom: s² = 3.5, and so is the
    # variance 2 s²/S of a difference over 2 seeds.
    found = compare(table([[1, 9], [1.5, 10.5], [0.5, 13.5]]), "v0")
    assert found.pool.df == 2 and found.pool.sd == pytest.approx(math.sqrt(3.5))
    assert found.differences["v1"].mean == 1 and found.differences["v1"].model == "pooled"
    assert found.differences["v1"].standard_error == pytest.approx(math.sqrt(3.5))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 99))
def test_missing_cells_are_fitted_as_by_dummies(variants, seeds, number):
    random = np.random.default_rng(number)
    values = table(random.standard_normal((variants, seeds)))
    dense = pooling._residual(values, list(values))
    values["extra"] = {}  # no cells at all: the general way, of the same answer
    assert pooling._residual(values, list(values)) == pytest.approx(dense)
    assert dense[1] == (variants - 1) * (seeds - 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_seeds_that_are_good_for_all_change_nothing(number):
    random = np.random.default_rng(number)
    rows, luck = random.standard_normal((4, 5)), 100 * random.standard_normal((1, 5))
    one, other = compare(table(rows), "v0"), compare(table(rows + luck), "v0")
    for name, found in one.differences.items():
        same = other.differences[name]
        assert same.mean == pytest.approx(found.mean) and same.p == pytest.approx(found.p, rel=1e-6)
        assert same.verdict == found.verdict


def test_holm_by_hand():
    # 0.01 x 3; 0.02 x 2 = 0.04; 0.03 x 1 is raised to the 0.04 before it.
    assert holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_one_diverging_variant_spoils_neither_its_own_verdict_nor_the_others():
    random = np.random.default_rng(1)
    rows = 0.01 * random.standard_normal((6, 5))
    rows[1] -= 0.1
    rows[4:] = 5 + 3 * random.standard_normal((2, 5))  # two of them do not hide each other
    found = compare(table(rows), "v0")
    assert set(found.pool.left_out) == {"v4", "v5"}
    assert found.pool.sd == pytest.approx(0.01, rel=0.5)
    assert found.differences["v1"].verdict == "better"
    wild = found.differences["v4"]
    assert wild.model == "own" and wild.df == 4 and "scatter" in wild.notes[0]


def test_a_noisy_reference_is_seen_by_every_pair():
    random = np.random.default_rng(2)
    rows = 0.01 * random.standard_normal((5, 6))
    rows[0] *= 300
    assert {d.model for d in compare(table(rows), "v0").differences.values()} == {"own"}


def test_a_bit_equal_variant_does_not_shrink_the_pool():
    random = np.random.default_rng(3)
    rows = random.standard_normal((3, 5))
    found = compare(table([*rows, rows[0]]), "v0")
    assert found.pool.left_out == {"v3": "bit-equal to v0"}
    alone = compare(table(rows), "v0").pool
    assert found.pool == dataclasses.replace(alone, left_out=found.pool.left_out)
    same = found.differences["v3"]
    assert same.verdict == "cannot tell" and same.p == 1 and "changed nothing" in same.notes[0]
    assert "no difference was seen" in verdict_text(same)
    # The reference may be the twin that is named second.
    assert compare(table([*rows, rows[0]]), "v3").differences["v1"].model == "pooled"


def test_failed_cells_are_left_out_pairwise_and_unpaired_as_a_last_resort():
    values = table([[1, 2, 3, 4], [1.1, 2.3, 3.2, 4.4]])
    del values["v1"][2]
    found = compare(values, "v0").differences["v1"]
    assert found.pairs == 3 and "1 seed" in found.notes[0]
    assert found.mean == pytest.approx((0.1 + 0.3 + 0.4) / 3)
    apart = table([[1.0, 1.2, 1.1]]) | {"v1": {7: 5.0, 8: 5.1, 9: 5.3}}
    found = compare(apart, "v0").differences["v1"]
    expected = stats.ttest_ind([5.0, 5.1, 5.3], [1.0, 1.2, 1.1], equal_var=False)
    assert found.model == "unpaired" and found.p == pytest.approx(expected.pvalue)
    assert found.verdict == "worse" and "unpaired" in found.notes[0]
    single = compare({"v0": {0: 1.0, 1: 2.0}, "v1": {0: 1.0}}, "v0").differences["v1"]
    assert single.model == "none" and single.verdict == "cannot tell" and single.p is None
    assert "two seeds that finished" in verdict_text(single)


def test_bad_input_is_named():
    values = table([[1, 2], [1, 2]])
    for words, arguments in (
        ("reference = 'x'", (values, "x")),
        ("seed 1 is not finite", (values | {"v1": {0: 1.0, 1: math.nan}}, "v0")),
        ("at least one beside", ({"v0": {0: 1.0}}, "v0")),
    ):
        with pytest.raises(ConfigError, match=words):
            compare(*arguments)
    with pytest.raises(ConfigError, match="smallest_effect"):
        compare(values, "v0", smallest_effect=0)


def test_power_is_the_published_one():
    # Paired t at effect 0.05 and differences of 0.03: 37 % at 3 seeds, 79 % at 5.
    for seeds, expected in ((3, 0.37), (5, 0.79)):
        found = power.power_of(0.05, 0.03 / math.sqrt(seeds), seeds - 1, 0.05)
        assert found == pytest.approx(expected, abs=0.01)
    for df, shift in ((1, 3.0), (4, 2.0), (30, 5.0)):
        bound = stats.t.isf(0.025, df)
        expected = stats.nct.sf(bound, df, shift) + stats.nct.cdf(-bound, df, shift)
        assert power.power_of(shift, 1.0, df, 0.05) == pytest.approx(expected, abs=1e-6)
    assert power.power_of(1e3, 1.0, 20, 0.05) == 1  # far out, where the series ends in no number


@settings(max_examples=40, deadline=None)
@given(st.floats(0.003, 3), st.integers(2, 8), st.sampled_from([2, 4, 16, math.inf]))
def test_the_recommended_seeds_are_the_least_that_do(effect, variants, sd_df):
    seeds = power.seeds_for(effect, 0.05, variants, sd_df=sd_df)
    at = lambda n: power.grid_power(effect, 0.05, sd_df, n, variants, 0.05)
    if seeds is None:
        assert at(power.MOST_SEEDS // 2) < 0.8
    else:
        assert at(seeds) >= 0.8 and (seeds == 2 or at(seeds - 1) < 0.8)


def test_a_known_error_asks_for_fewer_seeds_than_one_from_few():
    known, few = (power.seeds_for(0.05, 0.0212, 2, sd_df=df) for df in (math.inf, 2))
    assert known == 6 and few > 8  # 5 seeds would come to 79 %
    assert power.seeds_for(1e-6, 1.0, 2) is None


def test_verdict_texts():
    random = np.random.default_rng(4)
    rows = 0.01 * random.standard_normal((2, 4))
    rows[1] += 0.1
    worse = compare(table(rows), "v0", smallest_effect=0.5).differences["v1"]
    assert verdict_text(worse) == f"worse by {worse.mean:.3g}, less than the 0.5 of interest"
    rows[1] -= 0.1
    open_ = compare(table(rows), "v0", smallest_effect=0.01).differences["v1"]
    text = verdict_text(open_)
    assert text.startswith(f"cannot tell at this budget: {open_.seeds_needed} more seeds needed")
    assert f"{open_.seeds_needed + 4} in all find an effect of 0.01" in text and "is real" in text


def test_no_text_asks_for_seeds_that_nobody_has():
    pairs = 0.01 * np.array([-1, 1, -0.5, 0.5, 0.1])  # mean 0.0002, interval about ±0.01
    rows = np.stack([0 * pairs, pairs])
    text = lambda smallest: verdict_text(
        compare(table(rows), "v0", smallest_effect=smallest).differences["v1"]
    )
    many, interval = "more than 100 seeds", r"the interval is -0\.0\d+ to \+0\.0\d+"
    for smallest, words in (
        (None, f"the seen 0.0002, if real, would take {many} to be found; {interval}"),
        (1e-9, f"an effect of 1e-09 would take {many} to be found; {interval}"),
        (0.1, rf"{interval}, and leaves out differences of 0\.1 or more"),
    ):
        assert re.fullmatch(f"cannot tell at this budget: {words}", text(smallest)), text(smallest)


def test_an_interval_without_zero_that_is_not_enough_is_explained():
    random = np.random.default_rng(0)
    rows = 0.01 * random.standard_normal((12, 3))
    rows[1] = rows[0] + 0.015
    found = compare(table(rows), "v0", smallest_effect=1e-9).differences["v1"]
    assert found.p < 0.05 < found.p_holm
    assert "without zero, which is not enough among several comparisons" in verdict_text(found)


@pytest.mark.parametrize("variants, seeds, noise", [
    (2, 3, "normal"), (4, 5, "normal"), (8, 3, "normal"), (4, 4, "Student's t, 5 df"),
])  # fmt: skip
def test_false_positives(check, variants, seeds, noise):
    """At most 5 %: of 400 grids at most 34 (8.5 %), which true 5 % exceed once in 1,000 times."""
    random = np.random.default_rng(variants * seeds)
    made = {"variants": variants, "seeds": seeds, "errors": check.NOISE[noise]}
    assert check.false_positives(random, 400, **made) <= 34 / 400


def test_a_bootstrap_would_not_keep_five_percent(check):
    """What the tests above can see: a bootstrap of three seeds finds something in every fifth."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(300):
        values = check.grid(random, 2, 3)
        pairs = np.array([values["v1"][s] - values["v0"][s] for s in range(3)])
        means = random.choice(pairs, (500, 3)).mean(1)
        low, high = np.percentile(means, [2.5, 97.5])
        hits += not low <= 0 <= high
    assert hits / 300 > 0.15


def test_the_recommended_seeds_find_the_effect(check):
    """Within 10 % of the promised rate, and three standard errors of 250 grids."""
    found = check.recommended(np.random.default_rng(5), 250, 4, 5, 0.0)
    error = 3 * math.sqrt(found["promised"] * (1 - found["promised"]) / 250)
    assert found["found"] >= 0.9 * found["promised"] - error
    assert found["found"] <= 1.1 * found["promised"] + error


def test_real_runs_are_dealt_out_once_each(check):
    dealt = check.deal(np.random.default_rng(0), list(range(12)), 3, 4)
    assert sorted(v for seeds in dealt.values() for v in seeds.values()) == list(range(12))


def test_the_script_writes_its_tables(check, tmp_path):
    from made_ablation import made_grid, write_ablation

    seeds = range(12)
    folder = write_ablation(
        tmp_path / "a", made_grid({"base": 1.9, "other": 1.8}, seeds),
        variants=["base", "other"], seeds=seeds, amounts=[1e6],
    )  # fmt: skip
    output = tmp_path / "tables.md"
    text = check.main([f"--runs={folder}", "--grids=20", f"--output={output}"])
    assert "12 runs of 'base'" in text and "| 4 | 3 |" not in text and "| 3 | 3 | 20 |" in text
    assert output.read_text() == text
    assert statistics.CANNOT_TELL not in text
