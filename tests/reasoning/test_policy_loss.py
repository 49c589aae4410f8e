"""The policy's loss by hand, against a NumPy form written token by token, and its invariances."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.reasoning.losses import Totals, aggregate, k3, policy_loss, response_mask
from moejax.reasoning.rl_config import RLConfig

MAX_LENGTH = 8


@functools.partial(jax.jit, static_argnums=0)
def run(config, logp, old, sampler, reference, advantages, mask, entropy=None, totals=None):
    """Loss, metrics, and gradients with respect to ``logp`` and ``entropy``."""

    def loss(logp, entropy):
        return policy_loss(
            config, logp, old, sampler, reference, advantages, mask,
            entropy=entropy, max_length=MAX_LENGTH, totals=totals,
        )  # fmt: skip

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(logp, entropy)
    return value, metrics, gradients


# Two responses of 2 tokens and of 1, advantages 1 and -1, old probabilities all e^-1.
# Ratios 1.5 and 0.5 of the first, 1.5 of the second.
HAND_LOGP = np.float32([[math.log(1.5) - 1, math.log(0.5) - 1], [math.log(1.5) - 1, 7.0]])
HAND_MASK = np.float32([[1, 1], [1, 0]])
HAND = (HAND_LOGP, np.full((2, 2), -1, np.float32), None)
HAND_ADVANTAGES = np.float32([1, -1])


@pytest.mark.parametrize(
    "config, wanted",
    [
        # min(1.5, 1.2) = 1.2, min(0.5, 0.8) = 0.5: mean 0.85. min(-1.5, -1.2) = -1.5.
        (RLConfig("grpo", kl_weight=0.0), -(0.85 - 1.5) / 2),
        (RLConfig("dr_grpo"), -(1.2 + 0.5 - 1.5) / (2 * MAX_LENGTH)),
        (RLConfig("dapo"), -(1.28 + 0.5 - 1.5) / 3),  # clipped above at 1.28
        # R1's clip range of 10 clips neither.
        (RLConfig("r1", kl_weight=0.0), -(1.0 - 1.5) / 2),
        # Geometric mean of 1.5 and 0.5: 0.8660, below the range but A > 0. 1.5 with A < 0.
        (RLConfig("gspo"), -(math.sqrt(0.75) - 1.5) / 2),
    ],
)
def test_each_recipe_by_hand(config, wanted):
    value, metrics, _ = run(config, *HAND, None, HAND_ADVANTAGES, HAND_MASK)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics["surrogate"], -wanted, rtol=1e-6)


def test_the_kl_term_by_hand():
    # The reference is twice, half and once as likely: 2 - ln 2 - 1, 1/2 + ln 2 - 1 and 0.
    d = np.float32([[math.log(2), -math.log(2)], [0, 3]])
    config = RLConfig("grpo", kl_weight=0.5)
    value, metrics, _ = run(config, *HAND, HAND_LOGP + d, HAND_ADVANTAGES, HAND_MASK)
    # (1 - ln 2 + ln 2 - 1/2) / 2 for the first response, 0 for the second, their mean.
    np.testing.assert_allclose(metrics["kl"], (0.5 / 2 + 0) / 2, rtol=1e-5)
    np.testing.assert_allclose(value, 0.325 + 0.5 * 0.125, rtol=1e-5)


def test_metrics_by_hand():
    sampler = np.float32([[-1.05, -1.4], [-0.8, 9]])  # old -1: gaps 0.05, 0.4, 0.2
    config = RLConfig("grpo", kl_weight=0.0, truncated_is=1.2)
    value, metrics, _ = run(config, *HAND[:2], sampler, None, HAND_ADVANTAGES, HAND_MASK)
    near = lambda name, wanted: np.testing.assert_allclose(metrics[name], wanted, rtol=1e-5)
    near("gap/mean", 0.65 / 3)
    near("gap/max", 0.4)
    near("gap/share_beyond", 2 / 3)
    near("gap/k3", sum(math.exp(d) - d - 1 for d in (0.05, 0.4, -0.2)) / 3)
    weights = [math.exp(0.05), 1.2, math.exp(-0.2)]  # e^0.4 is beyond the cap
    near("truncated_is/mean", sum(weights) / 3)
    near("truncated_is/capped", 1 / 3)
    near("clip/high", 1 / 3)  # 1.5 with A > 0; not 1.5 with A < 0
    near("clip/low", 0)  # 0.5 has A > 0
    near("ratio/mean", 3.5 / 3)
    near("ratio/max", 1.5)
    near("response_length", 1.5)
    near("old_kl", (0.5 + 0.5 - math.log(1.5) - math.log(0.5) - 0.5 - math.log(1.5)) / 3)
    np.testing.assert_allclose(
        value, -((1.2 * weights[0] + 0.5 * weights[1]) / 2 - 1.5 * weights[2]) / 2, rtol=1e-5
    )


def test_a_sequence_s_clip_fraction_counts_responses():
    config = RLConfig("gspo", clip_low=0.1, clip_high=0.2)
    advantages = np.float32([-1, -1])  # sequence ratios 0.866 (below 0.9) and 1.5
    metrics = run(config, *HAND, None, advantages, HAND_MASK)[1]
    np.testing.assert_allclose(metrics["clip/low"], 1 / 2)
    assert metrics["clip/high"] == 0


# ---- Against a form written token by token, in float64.

LENGTHS = [5, 3, 1, 4]


def draw(seed=0):
    """Log-probabilities on both sides of every clip range, and NaN where there is padding."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(5)[None] < np.array(LENGTHS)[:, None]).astype(np.float32)
    logp = -rng.gamma(2.0, 0.5, mask.shape)
    near = lambda scale: logp + scale * rng.normal(size=mask.shape)
    arrays = [logp, near(0.3), near(0.4), near(0.5), rng.gamma(2.0, 0.5, mask.shape)]
    logp, old, sampler, reference, entropy = (
        np.where(mask > 0, array, np.nan).astype(np.float32) for array in arrays
    )
    advantages = np.float32([1.5, -0.5, 0.75, -1.25])
    return logp, old, sampler, reference, advantages, mask, entropy


def naive(config, logp, old, sampler, reference, advantages, entropy):
    """The loss as the papers write it, in Python's own numbers."""
    c, responses, total = config.resolved(), [], 0
    for b, length in enumerate(LENGTHS):
        logs = [logp[b, t] - old[b, t] for t in range(length)]
        tokens = []
        for t in range(length):
            log = logs[t] if c.ratio == "token" else sum(logs) / length
            r, a = math.exp(log), advantages[b]
            low, high = 1 - c.clip_low, 1 + c.clip_high
            surrogate = min(r * a, min(max(r, low), high) * a)
            if c.truncated_is:
                surrogate *= min(math.exp(old[b, t] - sampler[b, t]), c.truncated_is)
            d = reference[b, t] - logp[b, t]
            kl = math.exp(d) - d - 1
            if c.kl_estimate == "k3_weighted":
                kl *= math.exp(logs[t])
            tokens.append(-surrogate + c.kl_weight * kl - c.entropy_weight * entropy[b, t])
        responses.append(tokens)
        total += length
    if c.aggregate == "sequence_mean":
        return sum(sum(r) / len(r) for r in responses) / len(responses)
    if c.aggregate == "token_mean":
        return sum(map(sum, responses)) / total
    return sum(sum(r) / MAX_LENGTH for r in responses) / len(responses)


def differences(function, array, step=1e-6):
    """Central differences of a scalar function with respect to the tokens that count."""
    found = np.zeros_like(array)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            up, down = array.copy(), array.copy()
            up[b, t] += step
            down[b, t] -= step
            found[b, t] = (function(up) - function(down)) / (2 * step)
    return found


CONFIGS = {
    "grpo": RLConfig("grpo"),
    "r1": RLConfig("r1", truncated_is=1.1),
    "dr_grpo": RLConfig("dr_grpo", entropy_weight=0.01),
    "dapo": RLConfig("dapo", truncated_is=2.0),
    "gspo": RLConfig("gspo", clip_low=0.05, clip_high=0.1, kl_weight=0.1),
    "all": RLConfig(
        "dapo", kl_weight=0.3, kl_estimate="k3_weighted", entropy_weight=0.1, truncated_is=1.2
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_the_naive_form(name):
    config, inputs = CONFIGS[name], draw()
    *arrays, entropy = (array.astype(np.float64) for array in inputs)
    logp, *fixed = arrays[:5]
    value, _, (to_logp, to_entropy) = run(config, *inputs)
    wanted = naive(config, logp, *fixed, entropy)
    np.testing.assert_allclose(value, wanted, rtol=2e-6, atol=1e-7)
    for got, slope in (
        (to_logp, differences(lambda logp: naive(config, logp, *fixed, entropy), logp)),
        (to_entropy, differences(lambda entropy: naive(config, logp, *fixed, entropy), entropy)),
    ):
        np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-6)
        assert not np.any(np.asarray(got)[np.isnan(inputs[0])])  # padding, NaN and all


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_parts_of_a_batch_add_up_to_the_whole(name):
    config, inputs = CONFIGS[name], draw()
    value, metrics, (gradient, _) = run(config, *inputs)
    totals = Totals.of(jnp.asarray(inputs[5]))
    parts = [run(config, *(a[rows] for a in inputs), totals) for rows in ([0, 3], [1, 2])]
    np.testing.assert_allclose(sum(part[0] for part in parts), value, rtol=1e-5)
    np.testing.assert_allclose(
        sum(part[1]["surrogate"] for part in parts), metrics["surrogate"], rtol=1e-5, atol=1e-7
    )
    joined = np.concatenate([part[2][0] for part in parts])
    np.testing.assert_allclose(joined, np.asarray(gradient)[[0, 3, 1, 2]], rtol=1e-5, atol=1e-8)


# ---- Where the clipping takes the gradient away.


@pytest.mark.parametrize(
    "ratio, advantage, moves",
    [
        (1.0, 1, True), (1.0, -1, True),
        (1.27, 1, True), (1.29, 1, False),  # above the range, to be raised: clipped
        (1.29, -1, True), (50.0, -1, True),  # above, to be lowered: never clipped
        (0.81, -1, True), (0.79, -1, False),  # below, to be lowered: clipped
        (0.79, 1, True), (0.02, 1, True),  # below, to be raised: never clipped
        (1.0, 0, False), (50.0, 0, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_gradient_beyond_the_bounds(name, ratio, advantage, moves):
    config = RLConfig(name, clip_low=0.2, clip_high=0.28)
    old = np.float32([[-5.0]])
    logp, ones = old + np.float32(math.log(ratio)), np.ones((1, 1), np.float32)
    gradient = run(config, logp, old, None, None, np.float32([advantage]), ones)[2][0]
    wanted = -ratio * advantage if moves else 0.0
    np.testing.assert_allclose(gradient, [[wanted]], rtol=1e-5)


def test_absurd_log_probabilities_stay_finite():
    logp, old = np.float32([[-1e4, -0.1], [-0.1, -1e4]]), np.float32([[-0.1, -1e4], [-1e4, -0.1]])
    config = RLConfig("dapo", kl_weight=1.0, truncated_is=2.0)
    mask = np.ones((2, 2), np.float32)
    value, metrics, (gradient, _) = run(config, logp, old, logp, old, HAND_ADVANTAGES, mask)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    assert all(np.isfinite(metric) for metric in metrics.values())


# ---- On the policy's own samples.


@pytest.mark.parametrize("name", ["grpo", "gspo", "dapo", "dr_grpo"])
def test_on_policy_value_and_gradient(name):
    config = RLConfig(name, kl_weight=0.0)
    logp, *_, mask, _ = draw()
    advantages = np.float32([1, -1, 1, -1])
    value, metrics, (gradient, _) = run(config, logp, None, None, None, advantages, mask)
    lengths = np.array(LENGTHS)
    each, sums = {
        "grpo": (1 / (4 * lengths), 0),
        "gspo": (1 / (4 * lengths), 0),  # the value is 0, the gradient is not
        "dapo": (np.full(4, 1 / 13), 5 - 3 + 1 - 4),  # unequal lengths: -1/13
        "dr_grpo": (np.full(4, 1 / (4 * MAX_LENGTH)), 5 - 3 + 1 - 4),
    }[name]
    np.testing.assert_allclose(value, -sums * each[0], atol=1e-7)
    wanted = -(advantages * each)[:, None] * mask
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5)
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1
    assert metrics["old_kl"] == metrics["clip/low"] == metrics["clip/high"] == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_gspo_is_grpo_at_length_one(seed):
    rng = np.random.default_rng(seed)
    logp, old = -rng.gamma(2.0, 0.5, (2, 6, 1)).astype(np.float32)
    advantages, mask = rng.normal(size=6).astype(np.float32), np.ones((6, 1), np.float32)
    rest = (logp, old, None, None, advantages, mask)
    grpo = RLConfig("grpo", kl_weight=0.0, clip_low=0.2, clip_high=0.3)
    gspo = RLConfig("gspo", clip_low=0.2, clip_high=0.3)
    for got, wanted in zip(run(gspo, *rest)[::2], run(grpo, *rest)[::2], strict=True):
        np.testing.assert_allclose(jax.tree.leaves(got)[0], jax.tree.leaves(wanted)[0], rtol=1e-6)


def test_zero_advantages_have_no_gradient():
    inputs = list(draw())
    inputs[4] = np.zeros(4, np.float32)
    value, _, (gradient, _) = run(CONFIGS["dapo"], *inputs)
    assert value == 0 and not np.any(gradient)


def test_only_the_policy_has_a_gradient():
    logp, *others, advantages, mask, entropy = draw()

    def loss(others):
        return policy_loss(CONFIGS["all"], logp, *others, advantages, mask, entropy=entropy)[0]

    assert not any(np.any(gradient) for gradient in jax.jit(jax.grad(loss))(others))


# ---- The k3 estimate.


@settings(max_examples=50, deadline=None)
@given(st.floats(-50, 50, width=32), st.floats(-50, 0, width=32))
def test_k3_is_never_negative(d, logp):
    ones, logp = np.ones((1, 1), np.float32), np.full((1, 1), logp, np.float32)
    assert k3(logp, logp + np.float32(d), ones) >= 0
    assert k3(logp, logp, ones) == 0


def test_k3_s_mean_is_the_divergence_and_its_gradient_is_another_s():
    """Over all of a vocabulary, each token weighted by the policy's probability of it."""
    rng = np.random.default_rng(3)
    logits, other = jnp.asarray(rng.normal(size=(2, 7)), jnp.float32)
    reference = jax.nn.log_softmax(other)
    sampled = jax.nn.softmax(logits)  # where the tokens came from: no gradient
    ones = jnp.ones((1, 7))

    def estimate(logits, weighted):
        logp = jax.nn.log_softmax(logits)
        values = k3(logp[None], reference[None], ones)[0]
        ratio = jnp.exp(logp - jnp.log(sampled)) if weighted else 1.0
        return jnp.sum(sampled * ratio * values)

    def divergence(first, second):
        return jnp.sum(jnp.exp(first) * (first - second))

    reverse = lambda logits: divergence(jax.nn.log_softmax(logits), reference)
    forward = lambda logits: divergence(reference, jax.nn.log_softmax(logits))
    functions = reverse, forward, *(functools.partial(estimate, weighted=w) for w in (False, True))
    found = jax.jit(lambda logits: [jax.value_and_grad(f)(logits) for f in functions])(logits)
    reverse, forward, plain, weighted = found
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    near([plain[0], weighted[0]], [reverse[0]] * 2)
    near(plain[1], forward[1])
    near(weighted[1], reverse[1])
    assert np.abs(forward[1] - reverse[1]).max() > 0.05


def test_the_loss_weights_its_kl_where_asked():
    """One token each: the gradient of ``k3_weighted`` on-policy is (log policy - log reference)."""
    logp, reference = np.float32([[-1.0], [-2.0]]), np.float32([[-1.5], [-1.2]])
    ones, none = np.ones((2, 1), np.float32), np.zeros(2, np.float32)
    slope = lambda kind: run(
        RLConfig("grpo", kl_weight=1.0, kl_estimate=kind), logp, None, None, reference, none, ones
    )[2][0]
    np.testing.assert_allclose(slope("k3_weighted"), (logp - reference) / 2, rtol=1e-5)
    np.testing.assert_allclose(slope("k3"), (1 - np.exp(reference - logp)) / 2, rtol=1e-5)


# ---- Masks and refusals.


def test_response_mask_by_hand():
    # Prompts of 2 and 1 tokens, rows of 4 and 5. Target t is token t + 1.
    mask = response_mask(jnp.array([2, 1]), jnp.array([4, 5]), 5)
    assert mask.tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_a_batch_without_tokens_is_zero():
    zeros = np.zeros((2, 3), np.float32)
    for form in ("sequence_mean", "token_mean", "constant"):
        assert aggregate(zeros + 5, zeros, form, MAX_LENGTH) == 0


@pytest.mark.parametrize("form", ["sequence_mean", "token_mean", "constant"])
def test_rows_left_out_do_not_count(form):
    """Rows without tokens, as dynamic sampling leaves them, are as if they were not there."""
    values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    mask = draw()[5] * np.float32([1, 0, 1, 0])[:, None]
    got = aggregate(values, mask, form, MAX_LENGTH)
    wanted = aggregate(values[[0, 2]], mask[[0, 2]], form, MAX_LENGTH)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "config, name",
    [
        (RLConfig("grpo"), "reference_logp"),
        (RLConfig("dapo", entropy_weight=0.1), "entropy"),
        (RLConfig("dapo", truncated_is=2.0), "sampler_logp"),
    ],
)
def test_a_missing_array_is_named(config, name):
    with pytest.raises(ValueError, match=name):
        policy_loss(config, *HAND, None, HAND_ADVANTAGES, HAND_MASK)


def test_a_constant_divisor_needs_a_length():
    with pytest.raises(ValueError, match="max_length"):
        inputs = (*HAND, None, HAND_ADVANTAGES, HAND_MASK)
        jax.eval_shape(functools.partial(policy_loss, RLConfig("dr_grpo")), *inputs)
