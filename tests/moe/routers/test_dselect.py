"""DSelect-k: codes and gates by hand, and that it converges to at most k experts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import ConfigError
from moejax.moe.routers import dselect
from moejax.moe.routers.base import RouterInputs
from moejax.moe.routers.dselect import DSelectKOptions, DSelectKRouter

ONE = RouterInputs(jnp.ones((1, 1, 1)), jnp.ones((1, 1), bool))


def route(z, w, experts, inputs=ONE, **options):
    """A token of one feature, 1, whose selectors have these bits z (K, bits) and logits w (K,)."""
    router = DSelectKRouter(DSelectKOptions(**options), experts, len(w), parent=None)
    params = {
        "code_kernel": jnp.asarray(z, jnp.float32).reshape(1, -1),
        "code_bias": jnp.zeros((1, np.size(z))),
        "weight_kernel": jnp.asarray(w, jnp.float32)[None],
        "weight_bias": jnp.zeros((1, len(w))),
    }
    return jax.jit(router.apply)({"params": params}, inputs)


def test_the_smooth_step_by_hand():
    # gamma 2: 0 up to -1, 1 from 1, S(.5) = -2 / 64 · ... = .5 + .375 - .03125 = .84375.
    z = jnp.array([-3.0, -1, 0, 0.5, 1, 3])
    wanted = [0, 0, 0.5, 0.5 + 0.75 * 0.5 - 2 * 0.125 / 8, 1, 1]
    np.testing.assert_allclose(dselect.smooth_step(z, 2.0), wanted, rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda z: dselect.smooth_step(z, 2.0)))(z)
    np.testing.assert_allclose(slope, [0, 0, 0.75, 0.75 - 6 * 0.25 / 8, 0, 0], atol=1e-6)


def test_codes_are_binary_numbers_the_first_bit_the_highest():
    weights = dselect.decode(jnp.array([[[0.75, 0.1]]]))
    np.testing.assert_allclose(weights[0, 0], [0.225, 0.025, 0.675, 0.075], rtol=1e-6)
    assert [dselect.code_bits(e) for e in (1, 2, 3, 4, 5, 64)] == [1, 1, 2, 2, 3, 6]


def test_gates_by_hand():
    # Selector 0 has bits 1, 0: expert 2. Selector 1 has bits S(0) = 1/2 and 1: experts 1 and 3,
    # half each. alpha = softmax(log 3, 0) = 3/4, 1/4. Gates 0, 1/8, 3/4, 1/8; expert 0 is off.
    out = route([[0.5, -0.5], [0, 0.7]], [np.log(3), 0], 4)
    np.testing.assert_array_equal(out.expert, [[4, 1, 2, 3]])
    np.testing.assert_allclose(out.gate, [[0, 1 / 8, 3 / 4, 1 / 8]], rtol=1e-6)
    # Entropy: selector 0 none, selector 1 log 2; no loss of reach, for 4 is a power of two.
    np.testing.assert_allclose(out.aux_loss, 0.01 * np.log(2), rtol=1e-4)


def test_codes_without_an_expert_are_lost_and_penalised():
    # Three experts. Bits 1 and 1/2: codes 2 and 3, half each: code 3 is nobody's. Weight of the
    # experts 1/2: loss 1 / (1/2) - 1 = 1; the other selector is at expert 0: none.
    out = route([[0.5, 0], [-0.5, -0.5]], [0, 0], 3, entropy_loss_weight=0.0)
    np.testing.assert_allclose(out.gate, [[0.5, 0, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(out.aux_loss, 1, rtol=1e-4)
    lost = route([[0.5, 0.5], [0.5, 0.5]], [0, 0], 3)
    assert np.all(np.asarray(lost.expert) == 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lost))


def test_it_starts_with_all_experts_and_a_gradient_to_every_parameter():
    router = DSelectKRouter(DSelectKOptions(), 8, 2, parent=None)
    x = jax.random.normal(jax.random.key(0), (1, 16, 8))
    inputs = RouterInputs(x, jnp.ones((1, 16), bool))
    params = jax.jit(router.init)(jax.random.key(1), inputs)["params"]

    def total(params):
        out = router.apply({"params": params}, inputs)
        return jnp.sum(out.gate * jnp.arange(8.0)[None]), out

    gradients, out = jax.jit(jax.grad(total, has_aux=True))(params)
    assert float(out.stats["assignments"]) == 16 * 8
    np.testing.assert_allclose(np.asarray(out.gate).sum(axis=1), 1, rtol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("experts", [8, 6])
def test_it_converges_to_at_most_k_experts(experts):
    # 64 tokens fitted by a mixture of vectors, 2 of them a token.
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (1, 64, 8))
    wanted = jnp.tanh(x @ jax.random.normal(keys[1], (8, 16)))[0]
    options = DSelectKOptions(entropy_loss_weight=0.5)
    router = DSelectKRouter(options, experts, 2, parent=None)
    inputs = RouterInputs(x, jnp.ones((1, 64), bool))
    params = jax.jit(router.init)(keys[2], inputs)["params"]
    params = {"router": params, "values": 0.3 * jax.random.normal(keys[3], (experts, 16))}
    optimizer = optax.adam(5e-2)

    def loss(params):
        out = router.apply({"params": params["router"]}, inputs)
        return jnp.mean((wanted - out.gate @ params["values"]) ** 2) + out.aux_loss, out

    def step(carry, _):
        params, opt_state = carry
        grads, out = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), jnp.sum(out.expert < experts, -1)

    start = (params, optimizer.init(params))
    _, running = jax.jit(lambda c: jax.lax.scan(step, c, None, 500))(start)
    assert np.all(np.asarray(running[0]) == experts)
    last = np.asarray(running[-1])
    assert last.min() >= 1 and np.mean(last <= 2) > 0.95, np.bincount(last)


def test_padding_and_later_tokens_change_nothing():
    router = DSelectKRouter(DSelectKOptions(), 5, 2, parent=None)
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    valid = jnp.array([[True] * 5 + [False]])
    params = jax.jit(router.init)(jax.random.key(1), RouterInputs(x, valid))["params"]
    run = jax.jit(lambda x: router.apply({"params": params}, RouterInputs(x, valid)))
    one, two = run(x), run(x.at[:, 4:].multiply(-3.0))
    np.testing.assert_array_equal(one.gate[:4], two.gate[:4])
    np.testing.assert_array_equal(one.expert[:4], two.expert[:4])
    assert np.all(np.asarray(one.expert[5]) == 5)
    assert float(run(x).aux_loss) == float(run(x.at[:, 5].set(7.0)).aux_loss)


def test_options_that_do_not_fit_are_refused():
    for options in ({"gamma": 0.0}, {"orthogonal_loss_weight": 0.1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DSelectKOptions(**options)
    # 64 experts, 4 selectors of 6 bits and one weight each, with biases.
    assert DSelectKOptions().counts(16, 64, 4).params == 17 * 4 * 7
