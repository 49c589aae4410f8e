"""Balance losses and the bias rule, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import balance

UNIFORM = jnp.full((4, 4), 0.25)


@pytest.mark.parametrize(
    ("expert", "top_k"),
    # Four tokens over four experts: one each, and every pair of neighbours on the ring.
    [([[0], [1], [2], [3]], 1), ([[0, 1], [1, 2], [2, 3], [3, 0]], 2)],
)
def test_switch_loss_is_exactly_one_at_balance_for_every_k(expert, top_k):
    expert = jnp.asarray(expert)
    valid = jnp.ones(4, bool)
    fractions = balance.load_fractions(expert, valid, 4)
    np.testing.assert_array_equal(fractions, [0.25] * 4)
    probabilities = balance.mean_probabilities(UNIFORM, valid)
    assert float(balance.switch_balance_loss(fractions, probabilities)) == 1.0


def test_switch_loss_is_largest_when_one_expert_has_everything():
    # f = P = (1, 0, 0, 0): E · 1 · 1 = 4.
    one = jnp.array([1.0, 0.0, 0.0, 0.0])
    assert float(balance.switch_balance_loss(one, one)) == 4.0


def test_load_fractions_count_valid_tokens_only():
    # Valid are tokens 0 and 2: experts 0, 1 and 0, 2 of four assignments.
    expert = jnp.array([[0, 1], [3, 3], [0, 2]])
    valid = jnp.array([True, False, True])
    np.testing.assert_array_equal(balance.load_fractions(expert, valid, 4), [0.5, 0.25, 0.25, 0])
    nothing = balance.load_fractions(expert, jnp.zeros(3, bool), 4)
    np.testing.assert_array_equal(nothing, np.zeros(4))


def test_what_is_no_assignment_is_not_in_the_total():
    # Of E = 4: token 0 has experts 0 and none, token 1 has 1 and 2: a third each.
    expert = jnp.array([[0, 4], [1, 2]])
    fractions = balance.load_fractions(expert, jnp.ones(2, bool), 4)
    np.testing.assert_allclose(fractions, [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)


def test_z_loss_by_hand():
    # Log-sum-exp of (0, log 3) is log 4, of (1, 1) is 1 + log 2; the third token is padding.
    logits = jnp.array([[0.0, np.log(3.0)], [1.0, 1.0], [9.0, 9.0]])
    valid = jnp.array([True, True, False])
    wanted = (np.log(4) ** 2 + (1 + np.log(2)) ** 2) / 2
    np.testing.assert_allclose(jax.jit(balance.z_loss)(logits, valid), wanted, rtol=1e-6)
    assert float(jax.jit(balance.z_loss)(logits, jnp.zeros(3, bool))) == 0.0


# Two groups of two experts, K = 1, four tokens: experts 0, 1, 2, 0.
EXPERT = jnp.array([[[0], [1], [2], [0]]])
ALL = jnp.ones((1, 4), bool)
P = jnp.array([[[0.4, 0.3, 0.2, 0.1]] * 4])


def test_group_loss_by_hand():
    # Shares by group 3/4, 1/4; P by group .7, .3: 2 · (.75 · .7 + .25 · .3) = 1.2.
    fractions = balance.load_fractions(EXPERT, ALL, 4)
    mean = balance.mean_probabilities(P, ALL)
    np.testing.assert_allclose(balance.group_balance_loss(fractions, mean, 2), [1.2], rtol=1e-6)
    # One expert a group is the Switch loss; a single group is always balanced.
    switch = balance.switch_balance_loss(fractions, mean)
    np.testing.assert_allclose(balance.group_balance_loss(fractions, mean, 4), switch, rtol=1e-6)
    np.testing.assert_allclose(balance.group_balance_loss(fractions, mean, 1), [1.0], rtol=1e-6)


def test_communication_loss_by_hand():
    # K = 2: tokens go to groups {0}, {0, 1}, {1}, padding. Received 2 and 2 of M · 3 tokens with
    # G = 2, M = 2: f'' = 2 · 2 / (2 · 3) = 2/3 each; P'' = .7, .3: the loss is 2/3.
    expert = jnp.array([[[0, 1], [1, 2], [2, 3], [0, 3]]])
    valid = jnp.array([[True, True, True, False]])
    got = balance.communication_loss(expert, P, valid, 2, 2)
    np.testing.assert_allclose(got, [2 / 3], rtol=1e-6)


def test_importance_by_hand():
    # Sums of gates 3, 1, 0, 0 have mean 1 and variance (4 + 0 + 1 + 1) / 4 = 1.5; index 4 is none.
    expert, gate = jnp.array([[0, 1], [0, 4]]), jnp.array([[1.0, 1.0], [2.0, 9.0]])
    np.testing.assert_allclose(balance.importance_loss(expert, gate, 4), 1.5, rtol=1e-6)
    even = balance.importance_loss(jnp.array([[0, 1], [2, 3]]), jnp.ones((2, 2)), 4)
    assert float(even) == 0.0


def test_orthogonal_and_similarity_losses_are_zero_exactly_when_orthonormal():
    q = jnp.eye(4)[:, :3]
    assert float(balance.orthogonal_loss(q)) == float(balance.similarity_loss(q)) == 0.0
    # Twice as long columns are still orthogonal, but no longer of length one: 3 · |4 - 1| / 3.
    assert float(balance.orthogonal_loss(2 * q)) == 0.0
    assert float(balance.similarity_loss(2 * q)) == 3.0
    # Two equal unit columns of two: off-diagonal cosines 1, so 2 · 1 / 2 in both.
    same = jnp.array([[1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(balance.orthogonal_loss(same), 1.0, rtol=1e-6)
    np.testing.assert_allclose(balance.similarity_loss(same), 1.0, rtol=1e-6)
