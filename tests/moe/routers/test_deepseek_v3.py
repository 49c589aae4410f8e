"""DeepSeek-V3's router: cases by hand, and a NumPy reference written from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe.routers import (
    DeepSeekV3Options,
    DeepSeekV3Router,
    RouterInputs,
)
from moejax.moe.routers import (
    top_k as deepseek_v3,
)

# With an identity kernel a token's vector is its logits, so that cases can be given as scores.
SCORES = np.array([[[0.9, 0.6, 0.5, 0.1], [0.2, 0.8, 0.4, 0.6], [0.5, 0.3, 0.1, 0.7]]])

select = jax.jit(deepseek_v3.select, static_argnums=(2, 3, 4))


def logits_of(scores):
    return jnp.asarray(np.log(scores / (1 - scores)), jnp.float32)


def route(scores, top_k, bias=None, valid=None, **options):
    """Routes tokens with the given sigmoid scores (B, S, E); returns the decision."""
    experts = scores.shape[-1]
    router = DeepSeekV3Router(DeepSeekV3Options(**options), experts, top_k)
    bias = np.zeros(experts) if bias is None else bias
    valid = jnp.ones(scores.shape[:2], bool) if valid is None else jnp.asarray(valid)

    def run(x, bias):
        variables = {"params": {"kernel": jnp.eye(experts)}, "router_state": {"bias": bias}}
        return router.apply(variables, RouterInputs(x, valid))

    return jax.jit(run)(logits_of(scores), jnp.asarray(bias, jnp.float32))


def test_the_bias_selects_and_the_gate_ignores_it():
    # E = 4, K = 2, b = (0, 0, 0.3, 0), scale 2.5.
    #            s                   s + b              chosen   gates
    # token 0   .9 .6 .5 .1         .9 .6 .8 .1         0, 2     2.5 · (.9, .5) / 1.4
    # token 1   .2 .8 .4 .6         .2 .8 .7 .6         1, 2     2.5 · (.8, .4) / 1.2
    # token 2   .5 .3 .1 .7         .5 .3 .4 .7         3, 0     2.5 · (.7, .5) / 1.2
    out = route(SCORES, 2, bias=[0, 0, 0.3, 0])
    np.testing.assert_array_equal(out.expert, [[0, 2], [1, 2], [3, 0]])
    gates = [[0.9 / 1.4, 0.5 / 1.4], [0.8 / 1.2, 0.4 / 1.2], [0.7 / 1.2, 0.5 / 1.2]]
    np.testing.assert_allclose(out.gate, 2.5 * np.array(gates), rtol=1e-6)
    # Loads: expert 0 by tokens 0 and 2, expert 1 by token 1, expert 2 by 0 and 1, expert 3 by 2.
    np.testing.assert_array_equal(out.stats["load"], [2, 1, 2, 1])
    mass = 2.5 * np.array([0.9 / 1.4 + 0.5 / 1.2, 0.8 / 1.2, 0.5 / 1.4 + 0.4 / 1.2, 0.7 / 1.2])
    np.testing.assert_allclose(out.stats["gate_mass"], mass, rtol=1e-6)
    assert float(out.stats["tokens"]) == 3 and float(out.stats["assignments"]) == 6


def test_gates_without_renormalisation_are_the_scaled_scores():
    # Without a bias the chosen are the two best scores: (0, 1), (1, 3), (3, 0).
    out = route(SCORES, 2, normalize_gates=False, routed_scale=2.0)
    np.testing.assert_array_equal(out.expert, [[0, 1], [1, 3], [3, 0]])
    np.testing.assert_allclose(out.gate, [[1.8, 1.2], [1.6, 1.2], [1.4, 1.0]], rtol=1e-6)


def test_only_the_best_groups_are_open_and_a_group_scores_by_its_two_best():
    # E = 8 in G = 4 groups of 2, M = 2 kept, K = 3.
    #            group 0   group 1   group 2   group 3     sums               kept    chosen
    # token 0   .9  .1    .6  .5    .7  .35   .2  .2      1.0 1.1 1.05 .4     1, 2    4, 2, 3
    # token 1   .3  .3    .1  .2    .4  .5    .8  .05     .6  .3  .9   .85    2, 3    6, 5, 4
    # token 2   .9  .8    .7  .6    .5  .4    .3  .2      1.7 1.3 .9   .5     0, 1    0, 1, 2
    # Token 0's best expert, 0 with .9, stands in a closed group.
    scores = np.array(
        [
            [0.9, 0.1, 0.6, 0.5, 0.7, 0.35, 0.2, 0.2],
            [0.3, 0.3, 0.1, 0.2, 0.4, 0.5, 0.8, 0.05],
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
        ]
    )
    chosen = select(jnp.asarray(scores), jnp.zeros(8), 3, 4, 2)
    np.testing.assert_array_equal(chosen, [[4, 2, 3], [6, 5, 4], [0, 1, 2]])


def test_the_bias_also_moves_groups_and_closed_experts_stay_closed_below_zero():
    # Groups (0, 1), (2, 3). A bias of -2 on group 0 leaves group 1 the better one; and with -2 on
    # everything the open experts' biased scores are negative, still above the closed ones.
    scores = jnp.array([[0.9, 0.8, 0.6, 0.3]])
    down = jnp.array([-2.0, -2.0, 0.0, 0.0])
    np.testing.assert_array_equal(select(scores, down, 2, 2, 1), [[2, 3]])
    np.testing.assert_array_equal(select(scores, jnp.full(4, -2.0), 2, 2, 1), [[0, 1]])


def test_at_most_m_groups_are_touched_and_all_groups_are_plain_top_k():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.uniform(size=(64, 16)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=16) * 0.1, jnp.float32)
    limited = np.asarray(select(scores, bias, 4, 8, 2))
    groups = [len(set(row // 2)) for row in limited]
    assert max(groups) <= 2
    plain = jax.lax.top_k(scores + bias[None], 4)[1]
    assert max(len(set(row)) for row in np.asarray(plain) // 2) > 2, "the limit must bind"
    np.testing.assert_array_equal(select(scores, bias, 4, 8, 8), plain)


def numpy_route(scores, bias, top_k, groups, kept, scale):
    """Equations 13 to 16 of arXiv 2412.19437, token by token, with sorts."""
    experts, gates = [], []
    for token in scores:
        biased = token + bias
        members = np.arange(len(token)).reshape(groups, -1)
        group_scores = [np.sort(biased[m])[-2:].sum() for m in members]
        open_experts = np.concatenate([members[g] for g in np.argsort(group_scores)[-kept:]])
        best = open_experts[np.argsort(-biased[open_experts])][:top_k]
        experts.append(best)
        gates.append(scale * token[best] / token[best].sum())
    return np.array(experts), np.array(gates)


def test_equals_a_numpy_reference():
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.01, 0.99, (1, 48, 16))
    bias = rng.normal(size=16) * 0.2
    out = route(scores, 4, bias=bias, num_groups=4, groups_kept=2)
    experts, gates = numpy_route(scores[0], bias, 4, 4, 2, 2.5)
    np.testing.assert_array_equal(out.expert, experts)
    assert tiny.relative_error(out.gate, gates) < 1e-5


def test_gates_do_not_depend_on_the_bias_and_it_gets_no_gradient():
    router = DeepSeekV3Router(DeepSeekV3Options(), 4, 2)
    x = logits_of(SCORES)
    inputs = RouterInputs(x, jnp.ones((1, 3), bool))

    @jax.jit
    def run(bias, x):
        variables = {"params": {"kernel": jnp.eye(4)}, "router_state": {"bias": bias}}
        out = router.apply(variables, inputs.replace(x=x))
        return jnp.sum(out.gate * jnp.arange(6.0).reshape(3, 2)) + out.aux_loss, out

    # Every margin of the selection is 0.1 or more, so 0.04 changes none of it.
    small = jnp.array([0.04, 0.0, 0.02, 0.04])
    plain, moved = run(jnp.zeros(4), x)[1], run(small, x)[1]
    np.testing.assert_array_equal(plain.expert, moved.expert)
    np.testing.assert_array_equal(plain.gate, moved.gate)
    to_bias, to_x = jax.grad(lambda *args: run(*args)[0], argnums=(0, 1))(small, x)
    np.testing.assert_array_equal(to_bias, np.zeros(4))
    assert np.any(to_x)


def test_sequence_loss_by_hand():
    # Row 0: p = (.5, .25, .125, .125) for both tokens, which choose experts 0 and 1:
    #   f = (.5, .5, 0, 0), P = p, loss 4 · (.5 · .5 + .5 · .25) = 1.5.
    # Row 1: p = (.4, .4, .1, .1) and (.1, .1, .4, .4), choosing (0, 1) and (2, 3):
    #   f = P = (.25, .25, .25, .25), loss 4 · 4 · .0625 = 1, perfect balance.
    # Row 2 is padding and is not counted: the mean is over two rows, (1.5 + 1) / 2 = 1.25.
    row0 = [[0.8, 0.4, 0.2, 0.2], [0.4, 0.2, 0.1, 0.1]]
    row1 = [[0.8, 0.8, 0.2, 0.2], [0.1, 0.1, 0.4, 0.4]]
    scores = np.array([row0, row1, row0])
    valid = [[True, True], [True, True], [False, False]]
    loss = lambda rows: (
        route(scores[rows], 2, valid=[valid[i] for i in rows], sequence_loss_weight=0.01).aux_loss
    )
    np.testing.assert_allclose(loss([0, 1, 2]), 0.0125, rtol=1e-6)
    np.testing.assert_allclose(loss([0]), 0.015, rtol=1e-6)
    np.testing.assert_allclose(loss([1]), 0.01, rtol=1e-6)
    assert float(loss([2])) == 0.0


def test_the_sequence_loss_cannot_be_gamed_by_scaling_the_scores():
    # Halving every score of a token leaves its normalised probabilities, and the loss, as they are.
    loss = lambda scores: float(route(scores, 2, sequence_loss_weight=1.0).aux_loss)
    np.testing.assert_allclose(loss(SCORES / 2), loss(SCORES), rtol=1e-5)


def test_scores_that_all_vanish_give_finite_numbers():
    # sigmoid(-200) is 0 in float32; neither gates nor probabilities may divide 0 by 0.
    with np.errstate(divide="ignore"):
        out = route(np.array([[[1e-87] * 4] * 3]), 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_update_moves_the_bias_against_the_load():
    # Mean load 5: expert 0 is over it and falls by 0.1, expert 1 rises, 2 and 3 stay. Two layers.
    router = DeepSeekV3Router(DeepSeekV3Options(bias_step=0.1), 4, 2, parent=None)
    load = jnp.array([[10.0, 0.0, 5.0, 5.0], [5.0, 5.0, 5.0, 5.0]])
    new = router.update({"bias": jnp.full((2, 4), 0.5)}, {"load": load})
    np.testing.assert_allclose(new["bias"], [[0.4, 0.6, 0.5, 0.5], [0.5] * 4], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "experts", "top_k", "field"),
    [
        ({"num_groups": 3}, 8, 2, "router.num_groups"),
        ({"num_groups": 8, "groups_kept": 4}, 8, 2, "router.num_groups"),
        ({"num_groups": 4, "groups_kept": 1}, 8, 3, "router.groups_kept"),
        ({}, 8, 1, "router.normalize_gates"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, experts, top_k, field):
    with pytest.raises(ConfigError) as error:
        DeepSeekV3Options(**options).check(experts, top_k)
    assert error.value.field == field


def test_one_expert_a_token_is_fine_without_renormalisation():
    DeepSeekV3Options(normalize_gates=False).check(8, 1)


@pytest.mark.parametrize(
    "options", [{"groups_kept": 2}, {"bias_step": -1.0}, {"routed_scale": 0.0}]
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DeepSeekV3Options(**options)
