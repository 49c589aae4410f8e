"""Experts that choose tokens: cases by hand, equal loads, the leak, and thresholds that settle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.expert_choice import (
    ExpertChoiceOptions,
    ExpertChoiceRouter,
    ExpertThresholdOptions,
    ExpertThresholdRouter,
)

VALID = jnp.asarray(np.arange(8)[None] < np.array([[8], [2]]))


@functools.cache
def compiled(router, train):
    def run(variables, x, valid):
        return router.apply(variables, RouterInputs(x, valid, train=train))

    return jax.jit(run)


def choose(logits, top_k, train=True, valid=None, **options):
    """Expert choice with an identity kernel: the given logits (B, S, E) are the tokens."""
    experts = np.shape(logits)[-1]
    router = ExpertChoiceRouter(ExpertChoiceOptions(**options), experts, top_k)
    valid = jnp.ones(np.shape(logits)[:2], bool) if valid is None else jnp.asarray(valid)
    variables = {"params": {"kernel": jnp.eye(experts)}}
    return compiled(router, train)(variables, jnp.asarray(logits, jnp.float32), valid)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_each_expert_takes_its_best_token():
    # S = 3, E = 3, K = 1: C = 3 · 1 / 3 = 1 token for each expert.
    #            p                 expert 0's best is token 0 with .8, expert 1's token 2 with .5,
    # token 0   .8  .1  .1         expert 2's token 2 with .3. Token 2 gets two experts, token 1
    # token 1   .5  .4  .1         none.
    # token 2   .2  .5  .3
    p = np.array([[[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.2, 0.5, 0.3]]])
    out = choose(np.log(p), 1)
    np.testing.assert_array_equal(out.rows.token, [[0, 2, 2]])
    np.testing.assert_array_equal(out.expert[:, 0], [0, 1, 2])
    np.testing.assert_allclose(out.gate[:, 0], [0.8, 0.5, 0.3], rtol=1e-6)
    assert float(out.stats["unrouted"]) == 1


def test_evaluation_is_top_k_of_the_same_scores():
    p = np.array([[[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.2, 0.5, 0.3]]])
    out = choose(np.log(p), 2, train=False)
    np.testing.assert_array_equal(out.expert, [[0, 1], [0, 1], [1, 2]])
    np.testing.assert_allclose(out.gate, [[0.8, 0.1], [0.5, 0.4], [0.5, 0.3]], rtol=1e-6)


@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_loads_are_exactly_equal_however_skewed_the_scores(group):
    # T = 16, K = 2, E = 4: 2 · 16 / 4 = 8 tokens for every expert.
    logits = noise(2, 8, 4) + np.array([3.0, 0.0, 0.0, -3.0])
    out = choose(logits, 2, group=group)
    np.testing.assert_array_equal(out.stats["load"], [8, 8, 8, 8])


def test_the_groups_are_rows_or_the_batch():
    # Row 1's logits for expert 0 are all above row 0's: as one group row 0 gets nothing of it.
    logits = np.stack([noise(4, 2, seed=1), noise(4, 2, seed=2) + np.array([20.0, 0.0])])
    by_row, as_one = choose(logits, 1), choose(logits, 1, group="batch")
    assert by_row.rows.token.shape == (2, 4) and as_one.rows.token.shape == (1, 8)
    assert set(np.asarray(as_one.rows.token[0, :4])) == {4, 5, 6, 7}


def test_capacity_scales_the_work_and_is_at_most_all_tokens():
    # ceil(8 · 2 / 4 · 0.6) = ceil(2.4) = 3; and never above the group's 8.
    assert ExpertChoiceOptions(capacity=0.6).slots(8, 4, 2) == 3
    assert ExpertChoiceOptions(capacity=9.0).slots(8, 4, 2) == 8
    counts = ExpertChoiceOptions(capacity=0.5).counts(16, 8, 4)
    assert (counts.params, counts.expected_experts, counts.measured) == (128, 2.0, True)
    with pytest.raises(ConfigError, match="capacity"):
        ExpertChoiceOptions(capacity=0.0)


def test_a_later_token_displaces_an_earlier_one_in_training_only():
    logits = noise(1, 8, 4)
    moved = logits.copy()
    logits[0, -1, 0], moved[0, -1, 0] = -9, 9
    taken = lambda out: set(np.asarray(out.rows.token[0, :4]))
    assert taken(choose(logits, 2)) - taken(choose(moved, 2)), "expert 0 drops an earlier token"
    plain, changed = (choose(values, 2, train=False) for values in (logits, moved))
    np.testing.assert_array_equal(plain.expert[:-1], changed.expert[:-1])
    np.testing.assert_array_equal(plain.gate[:-1], changed.gate[:-1])


def test_padding_is_never_taken_and_leaves_slots_empty():
    # Row 1 has 2 real tokens, but C = 8 · 2 / 4 = 4: two slots of each expert stay empty.
    out = choose(noise(2, 8, 4) + 5, 2, valid=VALID)
    expert = np.asarray(out.expert).reshape(2, 4, 4)
    token = np.asarray(out.rows.token).reshape(2, 4, 4)
    np.testing.assert_array_equal((expert[1] < 4).sum(axis=1), [2, 2, 2, 2])
    assert set(token[1][expert[1] < 4]) == {0, 1}
    np.testing.assert_array_equal(out.stats["load"], [6, 6, 6, 6])
    assert np.asarray(out.gate).reshape(2, 4, 4)[1][expert[1] == 4].max() == 0


def layer_config(name, **moe):
    path = f"moejax.moe.routers.expert_choice.{name}"
    return tiny.moe_config(router=path, moe={"allow_leak": True, **moe}).moe


@pytest.mark.parametrize("dispatch", ["blocks", "dense_loop", "capacity"])
def test_in_a_layer_outputs_are_a_loop_over_slots_and_padding_gets_nothing(dispatch):
    config = layer_config("ExpertChoiceRouter", dispatch=dispatch, num_shared_experts=0)
    layer, x = MoELayer(config), jnp.asarray(noise(2, 8, 16), jnp.float32)
    inputs = RouterInputs(x, VALID, train=True)
    variables = tiny.draw(jax.eval_shape(layer.init, jax.random.key(0), inputs))

    def value(variables, x):
        y = layer.apply(variables, inputs.replace(x=x)).y
        return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(variables, x)
    params = variables["params"]
    kernel, weights = params["router"]["kernel"], params["experts"]
    wanted = np.zeros((2, 8, 16))
    for row, length in ((0, 8), (1, 2)):
        p = np.asarray(jax.nn.softmax(x[row, :length] @ kernel, axis=-1))
        for expert in range(8):
            for t in np.argsort(-p[:, expert])[:2]:  # C = 8 · 2 / 8
                gate_up = np.einsum("d,dgf->gf", x[row, t], weights["gate_up"][expert])
                hidden = gate_up[0] / (1 + np.exp(-gate_up[0])) * gate_up[1]
                wanted[row, t] += p[t, expert] * (hidden @ weights["down"][expert])
    assert tiny.relative_error(y, wanted) < 1e-5
    assert np.any(gradients[0]["params"]["router"]["kernel"])
    assert not np.any(gradients[1][1, 2:]) and np.any(gradients[1][1, :2])


def threshold_router(top_k=2, experts=4, **options):
    return ExpertThresholdRouter(ExpertThresholdOptions(**options), experts, top_k, parent=None)


def route(logits, state, valid=None, router=None):
    """Expert threshold with an identity kernel and the given state (threshold, updates)."""
    router = router or threshold_router(experts=np.shape(logits)[-1])
    valid = jnp.ones(np.shape(logits)[:2], bool) if valid is None else jnp.asarray(valid)
    variables = {
        "params": {"kernel": jnp.eye(np.shape(logits)[-1])},
        "router_state": {
            "threshold": jnp.asarray(state[0], jnp.float32),
            "updates": jnp.asarray(state[1], jnp.int32),
        },
    }
    return compiled(router, True)(variables, jnp.asarray(logits, jnp.float32), valid)


def to_logits(scores):
    return np.log(np.asarray(scores) / (1 - np.asarray(scores)))


SCORES = np.array([[[0.9, 0.6, 0.5, 0.1], [0.2, 0.3, 0.4, 0.1], [0.8, 0.7, 0.6, 0.5]]])


def test_an_expert_takes_what_is_above_its_threshold():
    # Thresholds (.85, .5, .45, .45): token 0 gets experts 0, 1, 2; token 1 none; token 2 gets
    # 1, 2, 3, whose scores are .7, .6, .5.
    out = route(to_logits(SCORES), ([0.85, 0.5, 0.45, 0.45], 3))
    np.testing.assert_array_equal(out.expert, [[0, 1, 2, 4], [4, 4, 4, 4], [4, 1, 2, 3]])
    gates = [[0.9, 0.6, 0.5, 0], [0, 0, 0, 0], [0, 0.7, 0.6, 0.5]]
    np.testing.assert_allclose(out.gate, gates, rtol=1e-6)
    assert float(out.stats["unrouted"]) == 1 and float(out.stats["assignments"]) == 6


def test_before_the_first_update_every_token_takes_its_best():
    # K = 2: experts (0, 1), (2, 1), (0, 1); a token of equal scores takes two all the same.
    out = route(to_logits(SCORES), ([0.0] * 4, 0))
    np.testing.assert_array_equal(out.expert, [[0, 1, 4, 4], [4, 1, 2, 4], [0, 1, 4, 4]])
    out = route(np.zeros((1, 3, 4)), ([0.0] * 4, 0))
    assert float(out.stats["assignments"]) == 6


def test_at_most_the_wanted_number_of_experts_the_best_ones():
    router = threshold_router(max_experts=2)
    out = route(to_logits(SCORES), ([0.85, 0.5, 0.45, 0.45], 3), router=router)
    np.testing.assert_array_equal(out.expert, [[0, 1], [4, 4], [1, 2]])
    np.testing.assert_allclose(out.gate, [[0.9, 0.6], [0, 0], [0.7, 0.6]], rtol=1e-6)


def test_the_first_update_sets_the_threshold_and_the_next_averages():
    # decay .5: corrected averages of q1, q2 are q1, then (.25 q1 + .5 q2) / .75 = (q1 + 2 q2) / 3.
    # One layer of two is not touched by a batch without tokens.
    router = threshold_router(experts=2, top_k=1, decay=0.5)
    first = route(to_logits([[[0.2, 0.6], [0.4, 0.8]]]), ([0.0] * 2, 0), router=router).stats
    second = route(to_logits([[[0.3, 0.1], [0.5, 0.3]]]), ([0.0] * 2, 0), router=router).stats
    both = lambda stats: {
        "score_histogram": jnp.stack([stats["score_histogram"]] * 2),
        "tokens": jnp.array([2.0, 0.0]),
    }
    state = {"threshold": jnp.full((2, 2), 0.7), "updates": jnp.zeros(2, jnp.int32)}
    one = jax.jit(router.update)(state, both(first))
    # K / E = 1/2: the bin of the upper of two values begins where one value lies above.
    np.testing.assert_allclose(one["threshold"][0], [0.4, 0.8], rtol=0.01)
    two = jax.jit(router.update)(one, both(second))
    np.testing.assert_allclose(
        two["threshold"][0], [(0.4 + 2 * 0.5) / 3, (0.8 + 2 * 0.3) / 3], rtol=0.01
    )
    np.testing.assert_array_equal(two["updates"], [2, 0])
    np.testing.assert_allclose(two["threshold"][1], [0.7, 0.7], rtol=1e-6)


def test_mean_experts_come_near_the_target_and_loads_near_balance():
    # Batches of one distribution, experts with quite different scores: K T / E = 2 · 512 / 4.
    router, state = threshold_router(decay=0.9), (np.zeros(4), 0)
    update = jax.jit(router.update)
    for seed in range(6):
        logits = noise(2, 256, 4, seed=seed) + np.array([2.0, 0.0, -1.0, -3.0])
        out = route(logits, state, router=router)
        new = update(
            {"threshold": jnp.asarray(state[0]), "updates": jnp.asarray(state[1])}, out.stats
        )
        state = new["threshold"], new["updates"]
    assert abs(float(out.stats["assignments"]) / 512 - 2) < 0.15
    np.testing.assert_allclose(out.stats["load"], 256, rtol=0.15)
    assert np.ptp(state[0]) > 0.5, "each expert has a threshold of its own"


def test_thresholds_are_causal_get_no_gradient_and_do_not_see_padding():
    state = ([0.5, 0.4, 0.6, 0.5], 1)
    logits = noise(1, 8, 4)
    moved = np.concatenate([logits[:, :-1], logits[:, -1:] + 5], axis=1)
    plain, changed = route(logits, state), route(moved, state)
    np.testing.assert_array_equal(plain.expert[:-1], changed.expert[:-1])
    np.testing.assert_array_equal(plain.gate[:-1], changed.gate[:-1])
    valid = np.arange(8)[None] < 7
    padded, other = route(logits, state, valid), route(moved, state, valid)
    np.testing.assert_array_equal(padded.stats["score_histogram"], other.stats["score_histogram"])
    assert float(jnp.sum(padded.stats["score_histogram"])) == 7 * 4
    np.testing.assert_array_equal(padded.expert[-1], [4, 4, 4, 4])

    def gates(threshold, x):
        return jnp.sum(jnp.sin(route_raw(threshold, x).gate))

    def route_raw(threshold, x):
        variables = {
            "params": {"kernel": jnp.eye(4)},
            "router_state": {"threshold": threshold, "updates": jnp.int32(1)},
        }
        return threshold_router().apply(variables, RouterInputs(x, jnp.ones((1, 8), bool)))

    to_threshold, to_x = jax.jit(jax.grad(gates, argnums=(0, 1)))(
        jnp.asarray(state[0]), jnp.asarray(logits, jnp.float32)
    )
    assert not np.any(to_threshold) and np.any(to_x)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"max_experts": -1}])
def test_threshold_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ExpertThresholdOptions(**options)


def test_fewer_experts_than_top_k_are_refused():
    with pytest.raises(ConfigError, match="max_experts"):
        ExpertThresholdOptions(max_experts=1).check(8, 2)
    ExpertThresholdOptions(max_experts=2).check(8, 2)
    assert ExpertThresholdOptions().counts(16, 8, 2).measured
