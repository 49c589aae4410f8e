"""SparseMixer-v2: cases by hand, the law of its samples, and Transformers' Phi-3.5-MoE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.sparsemixer import (
    SparseMixerOptions,
    SparseMixerRouter,
    choose,
    near_best,
)

WHY = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"


@functools.cache
def compiled(top_k, train, margin):
    """Routing of tokens (B, S, E) that are their own logits, by the gradient of weighted gates."""
    options = SparseMixerOptions(margin=margin, balance_loss_weight=0.0)

    def run(x, weights, valid, key):
        router = SparseMixerRouter(options, x.shape[-1], top_k)
        out = router.apply(
            {"params": {"kernel": jnp.eye(x.shape[-1])}}, RouterInputs(x, valid, train=train),
            rngs={"router": key},
        )  # fmt: skip
        return jnp.sum(out.gate * weights), out

    return jax.jit(jax.grad(run, has_aux=True))


def route(logits, top_k=2, train=False, margin=0.01, seed=0, weights=None, valid=None):
    """The gradient of the weighted gates to the logits, and the decision."""
    x = jnp.asarray(logits, jnp.float32)
    weights = np.ones((x.shape[0] * x.shape[1], top_k)) if weights is None else weights
    valid = jnp.ones(x.shape[:2], bool) if valid is None else jnp.asarray(valid)
    key = jax.random.key(seed)
    return compiled(top_k, train, margin)(x, jnp.asarray(weights, jnp.float32), valid, key)


def test_evaluation_takes_the_best_among_the_near():
    # Margin 0.1: near is m - z <= 0.2 · max(|z|, m).
    # Token 0, logits 4, 3.4, 3, -1. First: m = 4, near if within 0.8: 4 and 3.4, gate of expert 0
    #   1 / (1 + exp(-.6)) = .6457. Second: m = 3.4, within .68: 3.4 and 3: expert 1 with
    #   1 / (1 + exp(-.4)) = .5987.
    # Token 1, logits -1, -1.2, -3, -9. First: |z| counts: -1.2 is .2 away, allowed .24, but -3 is
    #   2 away, allowed .6: expert 0 with 1 / (1 + exp(-.2)) = .5498. Second: m = -1.2, -3 is 1.8
    #   away: expert 1 alone, with gate 1.
    grad, out = route([[[4, 3.4, 3, -1], [-1, -1.2, -3, -9]]], margin=0.1)
    np.testing.assert_array_equal(out.expert, [[0, 1], [0, 1]])
    np.testing.assert_allclose(out.gate, [[0.645656, 0.598688], [0.549834, 1.0]], rtol=1e-5)
    # A gate that is alone has gradient 0; that of token 1's first is p (1 - p) = .2475 both ways.
    np.testing.assert_allclose(grad[0, 1], [0.247517, -0.247517, 0, 0], rtol=1e-4, atol=1e-7)


def test_equal_logits_and_zeros_are_all_near():
    logits = jnp.zeros((1, 4))
    assert np.all(near_best(logits, jnp.zeros((1, 4), bool), 0.01))
    taken = jnp.array([[True, False, False, False]])
    np.testing.assert_array_equal(near_best(logits, taken, 0.01), ~taken)


def test_samples_follow_the_softmax_of_the_near_and_heuns_rule():
    # Logits (1.3, 1.2, 1.1, 0), margin 0.1: the first three are near the first (within .26), p =
    # (.3672, .3322, .3006). 4096 draws: three deviations are .023. Where the sample is not the
    # best, the gate is p / 3 in three quarters of the cases.
    tokens = 4096
    _, out = route(np.tile([1.3, 1.2, 1.1, 0], (1, tokens, 1)), train=True, margin=0.1)
    first, gate = np.asarray(out.expert)[:, 0], np.asarray(out.gate)[:, 0]
    p = np.exp([1.3, 1.2, 1.1])
    p /= p.sum()
    for expert in range(3):
        assert abs(np.mean(first == expert) - p[expert]) < 0.023
        values = gate[first == expert] / p[expert]
        third = np.isclose(values, 1 / 3, rtol=1e-5)
        assert np.all(third | np.isclose(values, 1.0, rtol=1e-5))
        assert abs(third.mean() - (0.75 if expert else 0.0)) < 0.04
    # The two choices differ, and the far expert is never chosen: with one of the first two taken
    # the third stays near; the second choice's size is that of what is left.
    second = np.asarray(out.expert)[:, 1]
    assert np.all(first != second) and second.max() == 2


def test_the_expected_factor_of_a_gate_that_is_not_the_best_is_a_half():
    # 1/4 · 1 + 3/4 · 1/3 = 1/2: Heun's nodes 1/3 and 1 integrate the identity over 0 to 1.
    draws = 8192
    logits = jnp.tile(jnp.array([[0.0, -0.001]]), (draws, 1))
    near = jnp.ones((draws, 2), bool)
    expert, value = jax.jit(choose)(logits, near, jax.random.key(3))
    other = np.asarray(expert) == 1
    assert abs(np.mean(np.asarray(value)[other] / 0.49975) - 0.5) < 0.02


@pytest.mark.parametrize("train", [False, True])
def test_a_later_token_changes_no_earlier_one(train):
    logits = 1 + 0.01 * np.random.default_rng(0).normal(size=(1, 2, 4))
    changed = logits + np.array([[[0], [1]]]) * np.arange(4)
    (_, one), (_, two) = route(logits, train=train), route(changed, train=train)
    np.testing.assert_array_equal(one.expert[0], two.expert[0])
    np.testing.assert_array_equal(one.gate[0], two.gate[0])
    assert not np.array_equal(one.expert[1], two.expert[1])


def test_padding_gets_neither_expert_nor_gradient():
    grad, out = route(np.ones((1, 2, 4)), train=True, valid=[[True, False]])
    np.testing.assert_array_equal(out.expert[1], [4, 4])
    np.testing.assert_array_equal(grad[0, 1], np.zeros(4))
    assert np.any(grad[0, 0]), "the router learns from the gates"


def test_evaluation_equals_transformers():
    torch = pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("transformers", reason=WHY)
    from transformers.models.phimoe import modeling_phimoe as hf

    logits = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    logits[:32] *= 0.02  # also rows whose experts are near one another
    logits[:16] += 1.0
    weights = np.random.default_rng(1).normal(size=(64, 2)).astype(np.float32)
    scores = torch.tensor(logits, requires_grad=True)
    gates, experts = hf.sparsemixer(scores, jitter_eps=0.01, training=False)
    torch.sum(gates * torch.tensor(weights)).backward()
    grad, ours = route(logits[None], weights=weights)
    np.testing.assert_array_equal(ours.expert, experts.numpy())
    assert tiny.relative_error(ours.gate, gates.detach().numpy()) < 1e-5
    assert tiny.relative_error(grad[0], scores.grad.numpy()) < 1e-4
    assert np.mean(np.asarray(ours.gate) < 0.99) > 0.2, "some tokens must have a choice"


def test_the_gradient_in_training_equals_transformers():
    # Its estimator, called with the experts and the factors that our router drew.
    torch = pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("transformers", reason=WHY)
    from transformers.models.phimoe import modeling_phimoe as hf

    logits = 1 + 0.05 * np.random.default_rng(2).normal(size=(64, 8)).astype(np.float32)
    weights = np.random.default_rng(3).normal(size=(64, 2)).astype(np.float32)
    grad, ours = route(logits[None], train=True, margin=0.03, weights=weights)
    scores = torch.tensor(logits, requires_grad=True)
    taken, gates = jnp.zeros(logits.shape, bool), []
    for choice in range(2):
        near = np.asarray(near_best(jnp.asarray(logits), taken, 0.03))
        expert = torch.tensor(np.asarray(ours.expert)[:, choice : choice + 1]).long()
        masked = torch.softmax(scores.masked_fill(~torch.tensor(near), -torch.inf), dim=-1)
        chosen = masked.gather(-1, expert)
        factor = np.asarray(ours.gate)[:, choice : choice + 1] / chosen.detach().numpy()
        gates.append(
            hf.PhimoeMultiplier.apply(scores, chosen, expert, masked, torch.tensor(factor))
        )
        taken |= jnp.arange(8)[None] == jnp.asarray(expert.numpy())
        assert set(np.round(factor.ravel(), 3)) == {np.float32(0.333), np.float32(1.0)}
    gates = torch.cat(gates, dim=-1)
    torch.sum(gates * torch.tensor(weights)).backward()
    assert tiny.relative_error(ours.gate, gates.detach().numpy()) < 1e-5
    assert tiny.relative_error(grad[0], scores.grad.numpy()) < 1e-4


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"moe.top_k"):
        SparseMixerOptions().check(8, 3)
    with pytest.raises(ConfigError, match=r"router.margin"):
        SparseMixerOptions(margin=-0.1)
    SparseMixerOptions().check(8, 1)
