"""Rules of the selection bias: by hand, and what balance each brings to fixed skewed scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.balance_rules import SCORES, trajectory
from moejax.moe import bias_rules
from moejax.moe.bias_rules import BiasRule
from moejax.moe.quantiles import histogram

LOAD = jnp.array([5.0, 1.0, 2.0, 0.0])  # mean 2: over, under, at, under


def test_sign_is_that_of_the_shortfall():
    new = bias_rules.sign_bias_update(jnp.zeros(4), LOAD, 1e-3)
    np.testing.assert_allclose(new, [-1e-3, 1e-3, 0.0, 1e-3], rtol=1e-6)


def test_a_centred_update_keeps_the_sum():
    # Signs -1, 1, 0, 1 have mean 1/4.
    new = bias_rules.centred_bias_update(jnp.ones(4), LOAD, 1e-2)
    np.testing.assert_allclose(new - 1, [-0.0125, 0.0075, -0.0025, 0.0075], atol=1e-7)
    assert float(new.sum()) == pytest.approx(4, abs=1e-6)


def test_smebu_by_hand():
    # v = (2 - c) / 2 = -1.5, .5, 0, 1; tanh(2v) = -.995055, .761594, 0, .964028, mean .182642.
    wanted = 0.5 * np.array([-1.177697, 0.578952, -0.182642, 0.781386])
    got = bias_rules.smebu_momentum(jnp.zeros(4), LOAD, 1.0, 0.5)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    again = bias_rules.smebu_momentum(got, LOAD, 1.0, 0.5)
    np.testing.assert_allclose(again, 1.5 * wanted, rtol=1e-5)


def test_longcat_moves_towards_the_target_share_and_leaves_the_others():
    # Shares 5/8, 1/8, 2/8, 0; targets 1/4, 1/4 of the first two; the last two are not steered.
    target = jnp.array([0.25, 0.25, -1.0, -1.0])
    got = bias_rules.longcat_bias_update(jnp.zeros(4), LOAD, target, 1.0)
    np.testing.assert_allclose(got, [-0.375, 0.125, 0, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["sign", "centred", "smebu"])
def test_stacked_layers_move_each_by_its_own_load_until_the_stop(name):
    rule = BiasRule(name, step=0.1, momentum=0.5, stop_step=2)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), rule.initial(4))
    loads = jnp.stack([LOAD, LOAD[::-1]])
    update = jax.jit(rule.update)
    one = update(stacked, loads)
    np.testing.assert_allclose(one["bias"][0], one["bias"][1][::-1], rtol=1e-6)
    assert np.any(one["bias"])
    two = update(one, loads)
    assert np.any(two["bias"] != one["bias"])
    three = update(two, loads)
    jax.tree.map(np.testing.assert_array_equal, {**three, "updates": 0}, {**two, "updates": 0})
    assert three["updates"].tolist() == [3, 3]


def test_no_rule_keeps_no_state():
    assert BiasRule("none", 0.1, 0.5, 0).initial(4) == {}


@functools.cache
def violations(rule):
    return trajectory(rule)


def test_the_scores_are_skewed():
    assert SCORES.shape == (4096, 32)
    assert 3 < violations("sign")[0] < 3.2


def test_the_sign_rule_balances_but_never_rests():
    # By steps of 0.01 it swings around balance for ever; by 0.001 it is near after 1,000 updates.
    last = violations("sign x10")[-50:]
    assert 0.03 < last.mean() < 0.3
    assert violations("sign")[300] > 0.1 > 0.05 > violations("sign")[-1]


def test_smebu_comes_to_rest_at_balance():
    assert violations("smebu x10")[-50:].max() < 0.005
    assert violations("smebu")[-1] < 0.03


def test_quantile_balances_in_six_updates():
    assert trajectory("quantile", 8)[6] < 0.04


def test_the_centred_rule_does_as_the_sign_rule():
    assert abs(violations("centred")[-1] - violations("sign")[-1]) < 0.02


def test_the_quantile_rule_does_not_drift():
    # All biases moved alike choose the same, so nothing else would hold their mean.
    rule = BiasRule("quantile", step=0.0, momentum=0.5, stop_step=0)
    counts = histogram(jnp.asarray(SCORES[:256]), jnp.ones(256, bool))
    state = rule.initial(32)
    for _ in range(3):
        state = rule.update(state, jnp.ones(32), counts, 4 / 32)
        assert abs(float(state["bias"].mean())) < 1e-6
    assert np.ptp(state["bias"]) > 0.1
