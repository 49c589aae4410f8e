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


def test_z_loss_by_hand():
    # Log-sum-exp of (0, log 3) is log 4, of (1, 1) is 1 + log 2; the third token is padding.
    logits = jnp.array([[0.0, np.log(3.0)], [1.0, 1.0], [9.0, 9.0]])
    valid = jnp.array([True, True, False])
    wanted = (np.log(4) ** 2 + (1 + np.log(2)) ** 2) / 2
    np.testing.assert_allclose(jax.jit(balance.z_loss)(logits, valid), wanted, rtol=1e-6)
    assert float(jax.jit(balance.z_loss)(logits, jnp.zeros(3, bool))) == 0.0


def test_bias_step_is_the_sign_of_the_shortfall():
    # Mean 2: loads 5, 1, 2, 0 are over, under, at and under it.
    new = balance.sign_bias_update(jnp.zeros(4), jnp.array([5.0, 1.0, 2.0, 0.0]), 1e-3)
    np.testing.assert_allclose(new, [-1e-3, 1e-3, 0.0, 1e-3], rtol=1e-6)
