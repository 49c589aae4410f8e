"""Noisy top-k and V-MoE: cases by hand, and the noise's law."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.noisy import (
    NoisyTopKOptions,
    NoisyTopKRouter,
    VMoEOptions,
    VMoERouter,
    chosen_again,
)


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def variation(values):
    return float(np.var(values) / np.mean(values) ** 2)


@functools.cache
def compiled(kind, experts, top_k, train, options):
    router = kind(kind.Options(**dict(options)), experts, top_k)
    params = {"kernel": jnp.eye(experts)}
    if kind is NoisyTopKRouter:
        params["noise_kernel"] = jnp.zeros((experts, experts))
    run = lambda x, valid, key: router.apply(
        {"params": params}, RouterInputs(x, valid, train=train), rngs={"router": key}
    )
    return jax.jit(run)


def route(kind, logits, top_k, train=False, seed=0, valid=None, fresh=False, **options):
    """Routes tokens with the given logits (B, S, E): the kernel is the identity, W_noise 0."""
    make = compiled.__wrapped__ if fresh else compiled
    run = make(kind, logits.shape[-1], top_k, train, tuple(options.items()))
    valid = jnp.ones(logits.shape[:2], bool) if valid is None else jnp.asarray(valid)
    return run(jnp.asarray(logits, jnp.float32), valid, jax.random.key(seed))


def test_in_evaluation_noisy_top_k_is_a_softmax_over_the_chosen():
    # Logits ln of (8, 4, 2, 1): the two best share 8 : 4. ln of (1, 1, 3, 6): 6 : 3.
    # Importance: expert 0 2/3, 1 1/3, 2 1/3, 3 2/3: mean 1/2, variance 1/36, CV² = 1/9.
    # Load, counted: one each: CV² = 0.
    logits = np.log([[[8, 4, 2, 1], [1, 1, 3, 6]]])
    out = route(NoisyTopKRouter, logits, 2)
    np.testing.assert_array_equal(out.expert, [[0, 1], [3, 2]])
    np.testing.assert_allclose(out.gate, [[2 / 3, 1 / 3]] * 2, rtol=1e-5)
    np.testing.assert_allclose(out.aux_loss, 0.1 / 9, rtol=1e-5)
    assert float(out.stats["loss_load"]) == 0.0
    # Padding counts for neither: token 0 alone has loads (1, 1, 0, 0), CV² = 1, and importance
    # (2/3, 1/3, 0, 0), mean 1/4, variance 11/144, CV² = 11/9.
    out = route(NoisyTopKRouter, logits, 2, valid=[[True, False]])
    np.testing.assert_allclose(out.aux_loss, 0.1 * 11 / 9 + 0.1, rtol=1e-5)


def test_importance_and_load_are_zero_at_balance():
    # Each expert is once first and once second, with the same margin.
    logits = 3.0 * np.array([[[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1], [1, 0, 0, 2]]])
    out = route(NoisyTopKRouter, logits, 2)
    np.testing.assert_allclose(out.aux_loss, 0.0, atol=1e-9)
    out = route(VMoERouter, logits, 2, importance_loss_weight=1.0)
    np.testing.assert_allclose(out.aux_loss, 0.0, atol=1e-9)


def test_the_load_is_the_probability_to_be_chosen_again():
    # K = 2; noisy logits (3, 2, 1, -1), so experts 0 and 1 are chosen. Their threshold is the best
    # that was not, 1; the threshold of 2 and 3 is the worst that was, 2. Clean (2.5, 1.5, 2, 0),
    # deviations (1, .5, 2, 1):
    #   Phi(1.5), Phi(.5 / .5 = 1), Phi(0 / 2 = 0) = 1/2, Phi(-2).
    clean, noisy = jnp.array([[2.5, 1.5, 2, 0]]), jnp.array([[3.0, 2, 1, -1]])
    deviation = jnp.array([[1, 0.5, 2, 1]])
    chosen = jnp.array([[True, True, False, False]])
    likely = chosen_again(clean, noisy, deviation, chosen)
    np.testing.assert_allclose(likely, [[phi(1.5), phi(1), 0.5, phi(-2)]], rtol=1e-5)


def test_noisy_top_k_with_a_given_noise(monkeypatch):
    # W_noise = 0: the deviation is d = ln 2 + 0.01 = 0.703. Clean (2, 1, 0), eps (0, -1, 1), so
    # noisy (2, 1 - d, d) = (2, 0.297, 0.703): 0 and 2 are chosen, gates softmax(2, d).
    # Threshold of the chosen 1 - d, of the other d: loads Phi((1 + d) / d), Phi((1 - d) / d) and
    # Phi((d - 1) / d).
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.array([[0.0, -1, 1]]))
    out = route(NoisyTopKRouter, np.array([[[2.0, 1, 0]]]), 2, True, fresh=True)
    d = math.log(2) + 0.01
    np.testing.assert_array_equal(out.expert, [[0, 2]])
    first = 1 / (1 + math.exp(d - 2))
    np.testing.assert_allclose(out.gate, [[first, 1 - first]], rtol=1e-5)
    load = [phi((1 + d) / d), phi((1 - d) / d), phi((d - 1) / d)]
    np.testing.assert_allclose(out.stats["loss_load"], variation(load), rtol=1e-5)
    importance = variation([first, 0, 1 - first])
    np.testing.assert_allclose(out.aux_loss, 0.1 * (variation(load) + importance), rtol=1e-5)


@pytest.mark.parametrize("kind", [NoisyTopKRouter, VMoERouter])
def test_noise_is_of_training_only_and_its_size_is_right(kind):
    # Two experts, K = 1 for V-MoE: the first wins with probability Phi(margin / (sqrt(2) sigma)).
    # V-MoE: sigma = 1/2, margin 0.5: Phi(0.7071) = 0.760.
    # Noisy top-k has K = 2 of 3 with the third far below: which of the two comes first. sigma =
    # softplus(0) + 0.01 = 0.703, margin 0.5: Phi(0.503) = 0.692.
    tokens = 4096
    if kind is VMoERouter:
        logits, top_k, wanted = np.tile([0.5, 0.0], (1, tokens, 1)), 1, phi(0.5 / (0.5 * 2**0.5))
    else:
        logits = np.tile([0.5, 0.0, -50.0], (1, tokens, 1))
        top_k, wanted = 2, phi(0.5 / ((math.log(2) + 0.01) * 2**0.5))
    noisy = route(kind, logits, top_k, True)
    rate = np.mean(np.asarray(noisy.expert)[:, 0] == 0)
    assert abs(rate - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / tokens)
    one, two = route(kind, logits, top_k, seed=1), route(kind, logits, top_k, seed=2)
    assert np.all(np.asarray(one.expert)[:, 0] == 0)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_vmoe_takes_gates_of_the_noisy_softmax_and_importance_of_the_clean_one():
    # One token, softmax (.5, .25, .125, .125): importance CV² = mean of squares · 16 - 1
    #   = (.25 + .0625 + 2 · .015625) / 4 · 16 - 1 = 0.375. In evaluation no load loss.
    logits = np.log([[[4, 2, 1, 1]]])
    out = route(VMoERouter, logits, 2)
    np.testing.assert_array_equal(out.expert, [[0, 1]])
    np.testing.assert_allclose(out.gate, [[0.5, 0.25]], rtol=1e-5)
    np.testing.assert_allclose(out.aux_loss, 0.005 * 0.375, rtol=1e-5)
    assert "loss_load" not in out.stats
    noisy = route(VMoERouter, logits, 2, True)
    assert not np.allclose(noisy.gate, out.gate)
    np.testing.assert_allclose(noisy.stats["loss_importance"], 0.375, rtol=1e-5)


def test_vmoe_with_a_given_noise(monkeypatch):
    # E = 2, so the deviation is 1/2. Clean (0.5, 0), eps (0, 2): noisy (0.5, 1), expert 1 with gate
    # e / (e + sqrt(e)). The threshold is 1 for both: loads Phi(-1) and Phi(-2).
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.array([[0.0, 2]]))
    out = route(VMoERouter, np.array([[[0.5, 0]]]), 1, True, fresh=True)
    np.testing.assert_array_equal(out.expert, [[1]])
    np.testing.assert_allclose(out.gate, [[1 / (1 + math.exp(-0.5))]], rtol=1e-5)
    load = variation([phi(-1), phi(-2)])
    np.testing.assert_allclose(out.stats["loss_load"], load, rtol=1e-5)
    # Importance from the clean softmax: p = 1 / (1 + exp(-0.5)) and 1 - p.
    p = 1 / (1 + math.exp(-0.5))
    np.testing.assert_allclose(out.aux_loss, 0.005 * (load + variation([p, 1 - p])), rtol=1e-5)
    # Without noise there is no load loss, in training either.
    out = route(VMoERouter, np.zeros((1, 1, 2)), 1, True, noise_std=0.0)
    assert "loss_load" not in out.stats


@pytest.mark.parametrize("kind", [NoisyTopKRouter, VMoERouter])
@pytest.mark.parametrize("train", [False, True])
def test_a_later_token_changes_no_earlier_one(kind, train):
    logits = np.random.default_rng(0).normal(size=(1, 2, 4))
    changed = logits + 9.0 * np.array([[[0], [1]]]) * np.arange(4)
    one, two = (route(kind, values, 2, train) for values in (logits, changed))
    np.testing.assert_array_equal(one.expert[0], two.expert[0])
    np.testing.assert_array_equal(one.gate[0], two.gate[0])
    assert not np.array_equal(one.gate[1], two.gate[1])


@pytest.mark.parametrize(
    ("kind", "top_k"), [(NoisyTopKRouter, 2), (VMoERouter, 1)], ids=["noisy_top_k", "vmoe"]
)
def test_gradients_reach_the_matrices_by_gates_and_by_the_load(kind, top_k):
    rng = np.random.default_rng(0)
    router = kind(kind.Options(), 4, top_k)
    x = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    valid = jnp.array([[True] * 3, [True, True, False]])
    shapes = jax.eval_shape(
        lambda key: router.init({"params": key, "router": key}, RouterInputs(x, valid)),
        jax.random.key(0),
    )
    params = tiny.draw(shapes["params"])

    def outputs(params, x):
        inputs = RouterInputs(x, valid, train=True)
        out = router.apply({"params": params}, inputs, rngs={"router": jax.random.key(1)})
        weights = 1.0 + jnp.arange(out.gate.size).reshape(out.gate.shape)
        return jnp.sum(out.gate * weights), out.aux_loss

    by_gate, by_loss = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(params, x)
    for to_params, to_x in (by_gate, by_loss):
        assert all(np.any(leaf) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_params))
        np.testing.assert_array_equal(to_x[1, 2], np.zeros(5), "padding gets no gradient")
        assert np.all(np.any(to_x[valid], axis=-1))
    expected = {"kernel", "noise_kernel"} if kind is NoisyTopKRouter else {"kernel"}
    assert set(params) == expected
    counted = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert counted == router.options.counts(5, 4, top_k).params


def test_all_experts_chosen_is_balance():
    out = route(NoisyTopKRouter, np.random.default_rng(0).normal(size=(1, 6, 4)), 4, True)
    assert float(out.stats["loss_load"]) == 0.0 and np.isfinite(out.aux_loss)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"moe.top_k"):
        NoisyTopKOptions().check(8, 1)
    with pytest.raises(ConfigError, match=r"router.noise_floor"):
        NoisyTopKOptions(noise_floor=0.0)
    with pytest.raises(ConfigError, match=r"router.noise_std"):
        VMoEOptions(noise_std=-1.0)
    with pytest.raises(ConfigError, match=r"router.load_loss_weight"):
        VMoEOptions(load_loss_weight=-1.0)
    VMoEOptions().check(8, 1)
