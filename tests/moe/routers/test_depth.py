"""Mixture of depths: who is chosen, who passes unchanged, and the predictor that decides later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.depth import (
    MixtureOfDepthsOptions,
    MixtureOfDepthsRouter,
    cross_entropy,
)

# The second row has 3 real tokens, fewer than its 4 places at a capacity of one half.
VALID = jnp.asarray(np.arange(8)[None] < np.array([[8], [3]]))


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def variables(experts=4, width=6, **changes):
    params = {
        "kernel": noise(4, experts, seed=1), "depth": noise(4, 1, seed=2),
        "predictor_in": noise(4, width, seed=3), "predictor_out": noise(width, 1, seed=4),
        "predictor_in_bias": jnp.zeros(width), "predictor_out_bias": jnp.zeros(1),
    }  # fmt: skip
    return {"params": {**params, **changes}}


@pytest.fixture(scope="module")
def runs():
    """Training and evaluation of a router with capacity 1/2, four experts and K = 2, jitted."""
    options = MixtureOfDepthsOptions(capacity=0.5, predictor_width=6)
    module = MixtureOfDepthsRouter(options, 4, 2)
    run = lambda train: jax.jit(
        lambda variables, x: module.apply(variables, RouterInputs(x, VALID, train=train))
    )
    return {train: run(train) for train in (True, False)}


def test_the_tokens_of_largest_weight_by_hand():
    # w = (1, 0, 0, 0), so that r is a token's first entry. S = 8 at 1/8: one token a row: the
    # one with r = 3, though -5 is larger in size. One expert, so p = 1 and the gate is r = 3.
    x = jnp.zeros((1, 8, 4)).at[0, :, 0].set(jnp.array([1.0, -5.0, 2.0, 3.0, 0.0, 1.0, 2.5, -1.0]))
    module = MixtureOfDepthsRouter(MixtureOfDepthsOptions(predictor_width=6), 1, 1)
    params = variables(1, depth=jnp.array([[1.0], [0.0], [0.0], [0.0]]))
    inputs = RouterInputs(x, jnp.ones((1, 8), bool), train=True)
    out = jax.jit(module.apply)(params, inputs)
    np.testing.assert_array_equal(out.rows.token, [[3]])
    np.testing.assert_array_equal(out.expert, [[0]])
    np.testing.assert_allclose(out.gate, [[3.0]], rtol=1e-6)
    assert float(out.stats["unrouted"]) == 7 and float(out.stats["assignments"]) == 1


def test_chosen_tokens_go_to_their_top_k_with_gate_r_times_p(runs):
    x, params = noise(2, 8, 4), variables()
    out = runs[True](params, x)
    p = np.asarray(jax.nn.softmax(x @ params["params"]["kernel"], axis=-1))
    r = np.asarray(x @ params["params"]["depth"])[..., 0]
    token = np.asarray(out.rows.token)
    np.testing.assert_array_equal(token[0], np.argsort(-r[0])[:4])
    np.testing.assert_array_equal(np.sort(token[1, :3]), [0, 1, 2])
    expert, gate = (np.asarray(v).reshape(2, 4, 2) for v in (out.expert, out.gate))
    np.testing.assert_array_equal(expert[1, 3], [4, 4])  # no fourth token to choose
    for row, place in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]:
        t = token[row, place]
        best = np.argsort(-p[row, t])[:2]
        np.testing.assert_array_equal(expert[row, place], best)
        np.testing.assert_allclose(gate[row, place], r[row, t] * p[row, t, best], rtol=1e-4)
    assert float(out.stats["tokens"]) == 11 and float(out.stats["assignments"]) == 14
    assert float(out.stats["unrouted"]) == 4


def guesses(params, x):
    p = {name: np.asarray(value) for name, value in params["params"].items()}
    hidden = np.asarray(x) @ p["predictor_in"] + p["predictor_in_bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    return (hidden @ p["predictor_out"] + p["predictor_out_bias"])[..., 0]


def test_in_evaluation_the_predictor_decides_for_each_token(runs):
    params = variables()
    x = noise(2, 8, 4).at[0, 7].set(-20 * params["params"]["depth"][:, 0])
    out, trained = runs[False](params, x), runs[True](params, x)
    passes = (guesses(params, x) > 0) & np.asarray(VALID)
    assert 0 < passes.sum() < 11
    np.testing.assert_array_equal(np.asarray(out.expert)[:, 0] < 4, passes.reshape(-1))
    right = passes == np.asarray(trained.rows.reached(trained.expert[:, 0] < 4, (2, 8)))
    assert float(out.stats["predicted"]) == (right & np.asarray(VALID)).sum()
    # Causal: the last token changes nothing before it; in training it takes another's place.
    moved = x.at[0, 7].set(20 * params["params"]["depth"][:, 0])
    changed = runs[False](params, moved)
    np.testing.assert_array_equal(out.expert[:7], changed.expert[:7])
    np.testing.assert_array_equal(out.gate[:7], changed.gate[:7])
    before, after = (set(np.asarray(runs[True](params, v).rows.token[0])) for v in (x, moved))
    assert 7 not in before and 7 in after


def test_cross_entropy_by_hand():
    # Logits 0, log 3 and -log 3 are probabilities 1/2, 3/4, 1/4; the tokens are chosen, chosen and
    # not: -log of 1/2, 3/4 and 3/4. Padding does not count.
    logit = jnp.array([[0.0, jnp.log(3.0), -jnp.log(3.0), 9.0]])
    target = jnp.array([[True, True, False, False]])
    valid = jnp.array([[True, True, True, False]])
    wanted = -(np.log(1 / 2) + 2 * np.log(3 / 4)) / 3
    np.testing.assert_allclose(cross_entropy(logit, target, valid), wanted, rtol=1e-6)


def test_the_predictors_loss_trains_it_alone_and_it_learns():
    options = MixtureOfDepthsOptions(
        capacity=0.5, predictor_width=6, predictor_loss_weight=1.0, balance_loss_weight=0.0
    )
    module = MixtureOfDepthsRouter(options, 4, 2)

    def loss(params, x):
        out = module.apply(params, RouterInputs(x, jnp.ones((2, 8), bool), train=True))
        return out.aux_loss, out.stats

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    params, x = variables(), noise(2, 8, 4)
    first = step(params, x)
    for name, gradient in first[1][0]["params"].items():
        assert np.any(gradient) == name.startswith("predictor"), name
    assert not np.any(first[1][1]), "no gradient into x"
    for _ in range(60):
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, step(params, x)[1][0])
    last = step(params, x)
    assert float(last[0][0]) < 0.5 * float(first[0][0])
    assert float(last[0][1]["predicted"]) >= 15


@pytest.mark.parametrize("dispatch", ["blocks", "capacity"])
def test_skipped_tokens_are_unchanged_and_padding_gets_no_gradient(dispatch):
    path = "moejax.moe.routers.depth.MixtureOfDepthsRouter"
    config = tiny.moe_config(
        router=path, dispatch=dispatch, options={"capacity": 0.25},
        moe={"allow_leak": True, "num_shared_experts": 0},
    ).moe  # fmt: skip
    layer, x = MoELayer(config), noise(2, 8, 16)
    inputs = RouterInputs(x, VALID, train=True)
    params = tiny.draw(jax.eval_shape(layer.init, jax.random.key(0), inputs))

    def value(params, x):
        out = layer.apply(params, inputs.replace(x=x))
        return jnp.sum(jnp.sin(out.y)), out

    (to_params, to_x), out = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(params, x)
    r = np.asarray(x @ params["params"]["router"]["depth"])[..., 0]
    r = np.where(np.asarray(VALID), r, -np.inf)
    chosen = np.zeros((2, 8), bool)
    np.put_along_axis(chosen, np.argsort(-r, axis=1)[:, :2], True, axis=1)  # 8 / 4 = 2 tokens
    np.testing.assert_array_equal(np.any(np.asarray(out.y) != 0, axis=-1), chosen)
    np.testing.assert_array_equal(np.any(np.asarray(to_x) != 0, axis=-1), chosen)
    router = to_params["params"]["router"]
    assert np.any(router["depth"]) and np.any(router["kernel"])
    assert float(out.stats["dropped"]) == 0


def test_balance_is_measured_among_the_chosen(runs):
    # Losses see the chosen tokens only: 7 of them with 2 experts each.
    x, params = noise(2, 8, 4), variables()
    out = runs[True](params, x)
    p = np.asarray(jax.nn.softmax(x @ params["params"]["kernel"], axis=-1))
    taken = [(0, t) for t in np.asarray(out.rows.token[0])] + [(1, t) for t in range(3)]
    mean = np.mean([p[place] for place in taken], axis=0)
    load = np.zeros(4)
    for place in taken:
        load[np.argsort(-p[place])[:2]] += 1
    loss = float(out.stats["loss_balance"]) / 11
    np.testing.assert_allclose(loss, 4 * np.sum(load / 14 * mean), rtol=1e-5)


def test_options_and_counts():
    for options in ({"capacity": 0.0}, {"capacity": 1.5}, {"predictor_width": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            MixtureOfDepthsOptions(**options)
    # 16 x 8 of the experts' router, 16 of r, 16 x 8 + 8 of the predictor, 8 + 1 biases.
    counts = MixtureOfDepthsOptions().counts(16, 8, 2)
    assert (counts.params, counts.flops_per_token) == (289, 2.0 * 280)
    assert (counts.expected_experts, counts.measured) == (0.25, True)
