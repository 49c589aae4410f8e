"""Measures of routing, by hand."""

import math

import numpy as np
import pytest

from moejax.analysis import routing


def choices(*experts, count=4):
    """Which tokens run through which of ``count`` experts, from a list of experts a token."""
    chosen = np.zeros((len(experts), count), bool)
    for token, own in enumerate(experts):
        chosen[token, list(own)] = True
    return chosen


# Four tokens, two of four experts each: loads 3, 3, 1, 1.
FINAL = choices([0, 1], [0, 1], [0, 2], [1, 3])


def test_load_and_shares():
    np.testing.assert_array_equal(routing.expert_load(FINAL), [3, 3, 1, 1])
    np.testing.assert_allclose(routing.shares(np.array([[3.0, 3, 1, 1], [0, 0, 0, 0]])),
                               [[3 / 8, 3 / 8, 1 / 8, 1 / 8], [0, 0, 0, 0]])  # fmt: skip


def test_max_violation_of_batches_and_of_all_of_them():
    # Each batch sends all 4 tokens to one of two experts: (4 - 2) / 2 = 1 in both batches. Together
    # the experts have 4 and 4: 0. The second layer is (3, 1), then (3, 1): 1/2 both ways.
    loads = np.array([[[4.0, 0], [3, 1]], [[0, 4], [3, 1]]])
    np.testing.assert_allclose(routing.max_violation_batch(loads), [1, 0.5])
    np.testing.assert_allclose(routing.max_violation_global(loads), [0, 0.5])


def test_dropped_share():
    np.testing.assert_allclose(
        routing.dropped_share(np.array([2.0, 0]), np.array([8.0, 0])), [0.25, 0]
    )


def test_saturation():
    # Experts in common with the final ones, of 2: both, one ({0, 1} and {0, 3}), none, both;
    # (2 + 1 + 0 + 2) / 2 over 4 tokens is 5/8.
    early = choices([1, 0], [0, 3], [1, 3], [3, 1])
    assert routing.saturation(early, FINAL) == pytest.approx(5 / 8)
    assert routing.saturation(FINAL, FINAL) == 1
    both = np.stack([early, FINAL])
    np.testing.assert_allclose(routing.saturation(both, np.stack([FINAL, FINAL])), [5 / 8, 1])


def test_saturation_where_tokens_have_unlike_numbers_of_experts():
    # The final model gives token 0 one expert (found), token 1 three (one found), token 2 none,
    # which does not count: (1 + 1/3) / 2.
    final = choices([2], [0, 1, 2], [])
    early = choices([2, 3], [1], [0])
    assert routing.saturation(early, final) == pytest.approx(2 / 3)


def test_flip_rate():
    # Tokens 1 and 2 have another set of experts than in FINAL; order does not matter.
    after = choices([1, 0], [0, 3], [1, 3], [3, 1])
    assert routing.flip_rate(FINAL, after) == 0.5
    assert routing.flip_rate(FINAL, FINAL) == 0


def test_coactivation_over_all_pairs():
    # Expert 0 has tokens 0, 1, 2: two with expert 1, one with expert 2. Expert 3's one token is
    # also expert 1's. Rows sum to K = 2, the diagonal's 1 among them.
    expected = [[1, 2 / 3, 1 / 3, 0], [2 / 3, 1, 0, 1 / 3], [1, 0, 1, 0], [0, 1, 0, 1]]
    found = routing.coactivation(FINAL)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 2, rtol=1e-6)


def test_an_unused_expert_goes_with_none():
    np.testing.assert_array_equal(
        routing.coactivation(choices([0], [0], count=2)), [[1, 0], [0, 0]]
    )


def test_domain_specialisation():
    # Domain 0 is tokens 0 and 1, both through experts 0 and 1; domain 1 is tokens 2 {0, 2} and
    # 3 {1, 3}; domain 2 is empty. Each full column sums to K = 2; K / E would be 1/2 everywhere.
    found = routing.domain_specialisation(FINAL, np.array([0, 0, 1, 1]), 3)
    np.testing.assert_allclose(found, [[1, 0.5, 0], [1, 0.5, 0], [0, 0.5, 0], [0, 0.5, 0]])


def test_token_shares():
    # Id 7 occurs at tokens 0, 2 and 3: expert 0 twice, 1 twice, 2 once, 3 once. Id 5 once.
    found = routing.token_shares(FINAL, np.array([7, 5, 7, 7]))
    np.testing.assert_array_equal(found.ids, [5, 7])
    np.testing.assert_array_equal(found.counts, [1, 3])
    expected = [[1, 1, 0, 0], [2 / 3, 2 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(found.share, expected, rtol=1e-6)
    layers = routing.token_shares(np.stack([FINAL, ~FINAL]), np.array([7, 5, 7, 7]))
    np.testing.assert_allclose(layers.share, [expected, 1 - np.array(expected)], rtol=1e-6)


def test_vocabulary_specialisation():
    shares = routing.token_shares(FINAL, np.array([7, 5, 7, 7]))
    # The two best of id 5 sum to 2, of id 7 to 4/3: over K = 2 that is 1 and 2/3, weighted by 1
    # and 3 occurrences (1 + 2) / 4. With ids that occur twice at least: 2/3.
    assert routing.vocabulary_specialisation(shares, 2, min_count=1) == pytest.approx(3 / 4)
    assert routing.vocabulary_specialisation(shares, 2, min_count=2) == pytest.approx(2 / 3)
    assert math.isnan(routing.vocabulary_specialisation(shares, 2, min_count=4))


def test_a_hash_of_the_id_settles_the_experts():
    ids = np.arange(40) % 5
    chosen = choices(*[[i % 4, (i + 1) % 4] for i in ids])
    shares = routing.token_shares(chosen, ids)
    assert routing.vocabulary_specialisation(shares, 2) == pytest.approx(1)


def test_the_ids_an_expert_is_surest_of():
    # From the shares above: expert 0 has id 5 at 1 (once) and id 7 at 2/3 (three times); expert 2
    # has id 7 alone.
    shares = routing.token_shares(FINAL, np.array([7, 5, 7, 7]))
    found = routing.most_specific(shares, 6, min_count=1)
    assert [(i, round(s, 4), n) for i, s, n in found[0]] == [(5, 1.0, 1), (7, 0.6667, 3)]
    assert [i for i, _, _ in found[2]] == [7]
    assert [i for i, _, _ in routing.most_specific(shares, 1, min_count=1)[0]] == [5]
    assert routing.most_specific(shares, 6, min_count=4) == [[], [], [], []]


def test_output_redundancy():
    # Token 0: outputs (1,0), (2,0), (0,3): cosines 1, 0, 0, mean 1/3. Token 1: (1,0), (-1,0) and
    # (0,1): -1, 0, 0, mean -1/3. Together 0.
    outputs = np.array([[[1.0, 0], [1, 0]], [[2, 0], [-1, 0]], [[0, 3], [0, 1]]])
    assert routing.output_redundancy(outputs[:, :1]) == pytest.approx(1 / 3)
    assert routing.output_redundancy(outputs) == pytest.approx(0, abs=1e-12)
    assert routing.output_redundancy(np.ones((4, 3, 2))) == pytest.approx(1)
    assert math.isnan(routing.output_redundancy(np.ones((1, 3, 2))))


def test_best_choices():
    # Ties go to the lower index, as in top-k.
    logits = np.array([[0.1, 0.9, 0.5, 0.9], [3.0, 2, 1, 0]])
    expected = [[False, True, False, True], [True, True, False, False]]
    np.testing.assert_array_equal(routing.best_choices(logits, 2), expected)
    np.testing.assert_array_equal(routing.best_choices(logits, 1)[0], [False, True, False, False])
    assert not routing.best_choices(logits, 0).any()


def test_masked_loss_is_over_targets_and_not_over_batches():
    # (6 + 2) / (3 + 1) = 2. For 8 nats on 2 targets and 1 on 1 it is 9 / 3 = 3; the mean of the
    # batches' losses, 4 and 1, would be 2.5.
    assert routing.masked_loss([6.0, 2.0], [3, 1]) == 2
    assert routing.masked_loss([8.0, 1.0], [2, 1]) == 3
    assert routing.masked_loss([], []) == 0


def test_bias_measures():
    # Mean of 1, -1, 3, 1 is 1; deviations 0, -2, 2, 0 have mean square 2.
    found = routing.bias_measures(np.array([[1.0, -1, 3, 1], [0, 0, 0, 0]]))
    np.testing.assert_allclose(found.mean, [1, 0])
    np.testing.assert_allclose(found.spread, [math.sqrt(2), 0])
    np.testing.assert_array_equal(found.least, [-1, 0])
    np.testing.assert_array_equal(found.largest, [3, 0])


def test_gradient_norm_by_layer():
    # Layer 0: 3² + 4² = 5², from two parameters; layer 1: 0.
    kernel, bias = np.array([[[3.0]], [[0]]]), np.array([[4.0], [0]])
    np.testing.assert_allclose(routing.gradient_norm([kernel, bias]), [5, 0])
