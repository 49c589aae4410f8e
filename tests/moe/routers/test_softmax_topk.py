"""The softmax router: both gate conventions, the Switch-style loss and the z-loss, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.moe.routers import RouterInputs, SoftmaxTopKOptions, SoftmaxTopKRouter

PROBABILITIES = np.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.2, 0.5], [0.3, 0.05, 0.6, 0.05]]])


def route(probabilities, top_k, shift=0.0, valid=None, **options):
    """Routes tokens with the given probabilities (B, S, E), whose logits are log p + shift."""
    experts = probabilities.shape[-1]
    options = {"balance_loss_weight": 0.0, "z_loss_weight": 0.0, **options}
    router = SoftmaxTopKRouter(SoftmaxTopKOptions(**options), experts, top_k)
    valid = jnp.ones(probabilities.shape[:2], bool) if valid is None else jnp.asarray(valid)
    run = jax.jit(
        lambda x: router.apply({"params": {"kernel": jnp.eye(experts)}}, RouterInputs(x, valid))
    )
    return run(jnp.asarray(np.log(probabilities) + shift, jnp.float32))


def test_gates_are_the_chosen_probabilities():
    # Token 1's second place is a tie of .2 and .2; the lower index wins.
    out = route(PROBABILITIES, 2)
    np.testing.assert_array_equal(out.expert, [[0, 1], [3, 1], [2, 0]])
    np.testing.assert_allclose(out.gate, [[0.4, 0.3], [0.5, 0.2], [0.6, 0.3]], rtol=1e-5)


def test_renormalised_gates_are_a_softmax_over_the_chosen_logits():
    # Mixtral's order, top-k and then softmax: .4/.7, .3/.7; .5/.7, .2/.7; .6/.9, .3/.9.
    out = route(PROBABILITIES, 2, normalize_gates=True)
    wanted = [[4 / 7, 3 / 7], [5 / 7, 2 / 7], [2 / 3, 1 / 3]]
    np.testing.assert_allclose(out.gate, wanted, rtol=1e-5)
    logits = jnp.log(jnp.asarray(PROBABILITIES[0], jnp.float32))
    other = jax.nn.softmax(jax.lax.top_k(logits, 2)[0], axis=-1)
    np.testing.assert_allclose(out.gate, other, rtol=1e-5)


def test_switch_gate_is_the_largest_probability_and_not_one():
    np.testing.assert_allclose(route(PROBABILITIES, 1).gate[:, 0], [0.4, 0.5, 0.6], rtol=1e-5)


def test_balance_loss_by_hand():
    # K = 2. Loads: 0 twice, 1 twice, 2 once, 3 once: f = (2, 2, 1, 1) / 6.
    # P = column means = (.8, .55, 1., .65) / 3.
    # E · sum f P = 4 · (2 · .8 + 2 · .55 + 1 · 1. + 1 · .65) / 18 = 4 · 4.35 / 18 = 0.966667.
    loss = route(PROBABILITIES, 2, balance_loss_weight=1.0).aux_loss
    np.testing.assert_allclose(loss, 4 * 4.35 / 18, rtol=1e-5)


def test_z_loss_by_hand_and_it_is_not_shift_invariant():
    # Logits log p + 2 have log-sum-exp 2 exactly, squared 4; unshifted ones 0. p stays.
    plain = route(PROBABILITIES, 2, z_loss_weight=0.5)
    shifted = route(PROBABILITIES, 2, shift=2.0, z_loss_weight=0.5)
    np.testing.assert_allclose(shifted.aux_loss, 0.5 * 4, rtol=1e-5)
    np.testing.assert_allclose(plain.aux_loss, 0.0, atol=1e-6)
    np.testing.assert_allclose(shifted.gate, plain.gate, rtol=1e-5)
    np.testing.assert_allclose(shifted.stats["squared_logsumexp"], 3 * 4, rtol=1e-5)


def test_losses_are_of_the_valid_tokens_only():
    # Token 2 left out, K = 1: f = (1, 0, 0, 1) / 2, P = (.5, .5, .4, .6) / 2,
    # loss 4 · (.25 + .3) / 2 = 1.1.
    valid = [[True, True, False]]
    out = route(PROBABILITIES, 1, valid=valid, balance_loss_weight=1.0)
    np.testing.assert_allclose(out.aux_loss, 1.1, rtol=1e-5)


def test_statistics_by_hand():
    out = route(PROBABILITIES, 2)
    entropy = -np.sum(PROBABILITIES * np.log(PROBABILITIES))
    np.testing.assert_allclose(out.stats["entropy"], entropy, rtol=1e-5)
    # Margins of the best over the second: .1, .3, .3.
    np.testing.assert_allclose(out.stats["top1_margin"], 0.7, rtol=1e-5)


def test_renormalising_a_single_gate_is_refused():
    with pytest.raises(ConfigError, match=r"normalize_gates.*learns nothing"):
        SoftmaxTopKOptions(normalize_gates=True).check(8, 1)
    SoftmaxTopKOptions(normalize_gates=True).check(8, 2)
    SoftmaxTopKOptions(normalize_gates=False).check(8, 1)
