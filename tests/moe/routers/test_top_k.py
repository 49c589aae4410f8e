"""The composed router: each choice by hand, and that they do not depend on one another."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.moe.routers import REGISTRY, RouterInputs, TopKOptions, TopKRouter, top_k

# With an identity kernel a token's vector is its logits.
LOGITS = np.array([[[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 1.0, 3.0], [1.0, -1.0, 2.0, 0.0]]])


def route(logits=LOGITS, k=2, router=TopKRouter, params=(), state=None, train=False, **options):
    """Routes tokens of the given logits."""
    experts = logits.shape[-1]
    made = router(router.Options(**options), experts, k)
    variables = {"params": {"kernel": jnp.eye(experts), **dict(params)}}
    if state is not None:
        variables["router_state"] = state

    def run(x, variables):
        inputs = RouterInputs(x, jnp.ones(x.shape[:2], bool), train=train)
        return made.apply(variables, inputs, rngs={"router": jax.random.key(0)})

    return jax.jit(run)(jnp.asarray(logits, jnp.float32), variables)


def test_scores_by_hand():
    logits = jnp.array([[0.0, np.log(3.0)]])
    np.testing.assert_allclose(top_k.score("softmax", logits), [[0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(top_k.score("sigmoid", logits), [[0.5, 0.75]], rtol=1e-6)
    # log(1 + 1) and log(1 + 3), their roots.
    wanted = np.sqrt(np.log([[2.0, 4.0]]))
    np.testing.assert_allclose(top_k.score("sqrt_softplus", logits), wanted, rtol=1e-6)


def test_a_softmax_over_the_chosen_is_renormalising():
    out = route(normalize_gates=True)
    chosen = np.take_along_axis(LOGITS[0], np.asarray(out.expert), axis=1)
    wanted = np.exp(chosen) / np.exp(chosen).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out.gate, wanted, rtol=1e-6)


def test_a_bias_on_the_logits_moves_choice_and_gate():
    # Logits of token 0 become 2, 1, 2.5, -1: experts 2 and 0, gates e^2.5 and e^2 over their sum.
    bias = jnp.array([0.0, 0.0, 2.5, 0.0])
    out = route(router=REGISTRY["gpt_oss"], params={"logit_bias": bias}.items())
    assert out.expert[0].tolist() == [2, 0]
    wanted = np.exp([2.5, 2.0]) / np.exp([2.5, 2.0]).sum()
    np.testing.assert_allclose(out.gate[0], wanted, rtol=1e-6)


def test_groups_by_their_best_or_their_two_best():
    # Groups (0, 1) and (2, 3) of token 1: best .5 and 3; of token 2: 1 and 2, two best 0 and 2.
    logits = np.array([[[1.0, 0.9, 1.2, -5.0]]])
    by_best = route(logits, num_groups=2, groups_kept=1, group_score="max", score="sigmoid")
    by_two = route(logits, num_groups=2, groups_kept=1, group_score="top2", score="sigmoid")
    assert sorted(by_best.expert[0].tolist()) == [2, 3]  # 1.2 is the best
    assert sorted(by_two.expert[0].tolist()) == [0, 1]  # sigmoid(1) + sigmoid(.9) is more


def test_all_groups_kept_is_plain_top_k():
    grouped = route(num_groups=2, groups_kept=2)
    jax.tree.map(np.testing.assert_array_equal, grouped, route())


@pytest.mark.parametrize("rule", ["sign", "centred", "smebu", "quantile"])
def test_a_rule_moves_choices_and_no_gate(rule):
    state = TopKOptions(bias_rule=rule).rule.initial(4)
    state = {**state, "bias": jnp.array([-5.0, 0.0, 0.0, 5.0])}
    out = route(bias_rule=rule, state=state)
    # Expert 3 always, expert 0 never; gates are the softmax of all four.
    assert out.expert[:, 0].tolist() == [3, 3, 3] and not np.any(out.expert == 0)
    p = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum(axis=1, keepdims=True)
    wanted = np.take_along_axis(p, np.asarray(out.expert), axis=1)
    np.testing.assert_allclose(out.gate, wanted, rtol=1e-5)
    router = TopKRouter(TopKOptions(bias_rule=rule), 4, 2)
    new = jax.jit(router.update)(state, out.stats)
    assert np.any(new["bias"] != state["bias"])


def test_jitter_is_for_training_only():
    calm, shaken = route(jitter=0.5), route(jitter=0.5, train=True)
    jax.tree.map(np.testing.assert_array_equal, calm, route())
    jax.tree.map(np.testing.assert_array_equal, shaken, route(jitter=0.5, train=True))
    assert np.any(shaken.gate != calm.gate)
    ratio = np.asarray(shaken.logits) / np.where(LOGITS == 0, 1, LOGITS)
    assert ratio[LOGITS != 0].min() >= 0.5 and ratio.max() <= 1.5


def test_every_score_goes_with_every_gate_and_rule():
    rules = ("none", "sign", "smebu", "quantile")
    for score, normalize, rule in itertools.product(
        ("softmax", "sigmoid", "sqrt_softplus"), (False, True), rules
    ):
        options = TopKOptions(score=score, normalize_gates=normalize, bias_rule=rule)
        options.check(4, 2)
        router = TopKRouter(options, 4, 2)
        inputs = RouterInputs(jnp.ones((1, 3, 4)), jnp.ones((1, 3), bool))
        out = jax.eval_shape(router.init_with_output, jax.random.key(0), inputs)[0]
        assert out.gate.shape == (3, 2)


def test_losses_compose_and_are_reported():
    # Each loss by itself, with the others' weights 0, adds up to all of them together.
    weights = {
        f"{name}_loss_weight": 0.1 * (i + 1)
        for i, name in enumerate(
            ("balance", "sequence", "global", "importance", "z", "orthogonal", "similarity",
             "device", "communication")
        )
    }  # fmt: skip
    groups = dict(num_groups=2, groups_kept=1, group_score="max")
    kernel = {"kernel": jnp.eye(4) + 0.1}
    each = [route(params=kernel, **{name: w}, **groups) for name, w in weights.items()]
    assert all(float(out.aux_loss) > 0 for out in each)
    together = route(params=kernel, **weights, **groups)
    total = sum(float(out.aux_loss) for out in each)
    np.testing.assert_allclose(together.aux_loss, total, rtol=1e-5)
    for (name, weight), out in zip(weights.items(), each, strict=True):
        reported = out.stats["loss_" + name.removesuffix("_loss_weight")] / out.stats["tokens"]
        np.testing.assert_allclose(weight * reported, out.aux_loss, rtol=1e-6)


def test_weights_by_layer():
    router = TopKRouter(TopKOptions(z_loss_weight=1.0, layer_weights=(1.0, 0.0, 3.0)), 4, 2)
    run = jax.jit(
        lambda x, layer: (
            router.apply(
                {"params": {"kernel": jnp.eye(4)}},
                RouterInputs(x, jnp.ones(x.shape[:2], bool), layer=layer),
            ).aux_loss
        )
    )
    losses = [float(run(jnp.asarray(LOGITS, jnp.float32), jnp.int32(i))) for i in range(3)]
    assert losses[1] == 0 and losses[2] == pytest.approx(3 * losses[0])


@pytest.mark.parametrize(
    ("options", "k", "message"),
    [
        (dict(normalize_gates=True), 1, "router.normalize_gates = True: with moe.top_k = 1"),
        (dict(num_groups=3), 2, "router.num_groups = 3: does not divide moe.num_experts = 8"),
        (dict(num_groups=8, groups_kept=4), 2, "leaves one expert a group"),
        (dict(num_groups=4, groups_kept=1), 3, "router.groups_kept = 1: leaves 2 experts"),
        (dict(bias_rule="quantile"), 8, "router.bias_rule = 'quantile': needs moe.top_k below"),
    ],
)
def test_what_does_not_fit_the_experts_is_refused(options, k, message):
    with pytest.raises(ConfigError, match=message):
        TopKOptions(**options).check(8, k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(groups_kept=2), "router.groups_kept = 2: is above router.num_groups = 1"),
        (dict(jitter=-0.1), "router.jitter = -0.1: must not be below zero"),
        (dict(device_loss_weight=-1.0), "router.device_loss_weight = -1.0"),
        (dict(bias_step=-1.0), "router.bias_step = -1.0"),
        (dict(bias_stop_step=-1), "router.bias_stop_step = -1"),
    ],
)
def test_constants_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TopKOptions(**options)
