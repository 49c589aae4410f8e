"""DPO by hand, against a naive form, and what is refused."""

import math

import jax
import numpy as np
import pytest

from moejax.config import ConfigError, build
from moejax.training.preferences import PreferenceConfig, preference_loss, response_log_probs

NAN = math.nan
# One pair. Chosen: 2 tokens, log-ratios 0.5 and 0.3; rejected: 3 tokens, -0.2, 0.1 and -0.3.
CHOSEN = np.float32([[-1.0, -2.0, NAN]])
REJECTED = np.float32([[-1.0, -1.0, -1.0]])
CHOSEN_REFERENCE = np.float32([[-1.5, -2.3, NAN]])
REJECTED_REFERENCE = np.float32([[-0.8, -1.1, -0.7]])
MASKS = np.float32([[1, 1, 0]]), np.float32([[1, 1, 1]])


def log_sigmoid(z):
    return -math.log(1 + math.exp(-z))


@pytest.mark.parametrize(
    "config, wanted",
    [
        (PreferenceConfig(), -log_sigmoid(0.1 * (0.8 + 0.4))),
        (PreferenceConfig(beta=2.0), -log_sigmoid(2 * 1.2)),
        (
            PreferenceConfig(label_smoothing=0.2),
            -0.8 * log_sigmoid(0.12) - 0.2 * log_sigmoid(-0.12),
        ),
        # Without the reference: sums -3 and -3; means -1.5 and -1.
        (PreferenceConfig(reference_free=True), math.log(2)),
        (
            PreferenceConfig(beta=2.0, reference_free=True, length_normalized=True, margin=0.5),
            -log_sigmoid(2 * (-1.5 + 1) - 0.5),
        ),
        # The preferred response's two tokens cost 1.5 nats each.
        (PreferenceConfig(chosen_weight=0.5), -log_sigmoid(0.12) + 0.5 * 1.5),
    ],
)
def test_by_hand(config, wanted):
    loss, metrics = preference_loss(
        config, CHOSEN, REJECTED, *MASKS, CHOSEN_REFERENCE, REJECTED_REFERENCE
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss)


def test_the_gradient_is_the_paper_s():
    """-beta sigmoid(rejected reward - chosen reward) for each chosen token (section 4), and the
    opposite for each rejected one; padding has none."""
    config = PreferenceConfig(beta=0.5)

    def loss(chosen, rejected):
        return preference_loss(
            config, chosen, rejected, *MASKS, CHOSEN_REFERENCE, REJECTED_REFERENCE
        )[0]

    to_chosen, to_rejected = jax.grad(loss, (0, 1))(CHOSEN, REJECTED)
    slope = 0.5 / (1 + math.exp(0.5 * 1.2))
    np.testing.assert_allclose(to_chosen, [[-slope, -slope, 0]], rtol=1e-5)
    np.testing.assert_allclose(to_rejected, [[slope] * 3], rtol=1e-5)


def test_a_weight_holds_the_preferred_response_only():
    """Its two tokens get half a unit each, times the weight; the other response's get nothing."""
    slopes = []
    for weight in (0.0, 3.0):
        config = PreferenceConfig(chosen_weight=weight)
        loss = lambda *both, config=config: preference_loss(
            config, *both, *MASKS, CHOSEN_REFERENCE, REJECTED_REFERENCE
        )[0]
        slopes.append(jax.grad(loss, (0, 1))(CHOSEN, REJECTED))
    (plain, other), (held, same) = slopes
    np.testing.assert_allclose(held - plain, [[-1.5, -1.5, 0]], rtol=1e-5)
    np.testing.assert_array_equal(other, same)


def test_metrics_by_hand():
    both = lambda first, second: np.concatenate([first, second])
    # A second pair is the first the other way round.
    masks = both(*MASKS), both(*MASKS[::-1])
    _, metrics = preference_loss(
        PreferenceConfig(), both(CHOSEN, REJECTED), both(REJECTED, CHOSEN), *masks,
        both(CHOSEN_REFERENCE, REJECTED_REFERENCE), both(REJECTED_REFERENCE, CHOSEN_REFERENCE),
    )  # fmt: skip
    wanted = {"reward/chosen": 0.02, "reward/rejected": 0.02, "reward/margin": 0, "accuracy": 0.5}
    wanted["chosen_nll"] = (1.5 + 1) / 2
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-7)


def test_a_response_without_tokens_is_finite():
    assert response_log_probs(CHOSEN, np.zeros((1, 3), np.float32), mean=True) == 0


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match="reference"):
        preference_loss(PreferenceConfig(), CHOSEN, REJECTED, *MASKS)


@pytest.mark.parametrize(
    "field, value",
    [("beta", 0.0), ("label_smoothing", 0.5), ("margin", -1.0), ("chosen_weight", -0.1)],
)
def test_refused_values(field, value):
    with pytest.raises(ConfigError) as error:
        build(PreferenceConfig, {field: value}, "preferences")
    assert error.value.field == f"preferences.{field}"
