"""Losses, gradients and metrics against those that TRL computed, recorded by
``fixtures/make_trl.py``: the arithmetic of someone else."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.reasoning.advantages import group_advantages
from moejax.reasoning.losses import policy_loss
from moejax.reasoning.rl_config import RLConfig
from moejax.training.distillation import DistillConfig, distillation_loss
from moejax.training.preferences import PreferenceConfig, preference_loss

RECORDED = json.loads((pathlib.Path(__file__).parent / "fixtures" / "trl.json").read_text())
ARRAYS = {name: np.float32(array) for name, array in RECORDED["arrays"].items()}
MASK = np.float32(RECORDED["mask"])
POLICY = {
    "grpo": RLConfig("grpo"),
    "grpo weighted kl": RLConfig("grpo", kl_weight=0.3, kl_estimate="k3_weighted"),
    "grpo truncated": RLConfig("grpo", kl_weight=0.0, truncated_is=1.2),
    "dr_grpo": RLConfig("dr_grpo"),
    "dapo": RLConfig("dapo"),
    "gspo": RLConfig("gspo", clip_low=0.05, clip_high=0.1),
}
PREFERENCES = {
    "dpo": PreferenceConfig(beta=0.4),
    "normalized": PreferenceConfig(beta=0.4, length_normalized=True),
    "smoothed": PreferenceConfig(beta=0.4, label_smoothing=0.1),
    "held": PreferenceConfig(beta=0.4, chosen_weight=0.7),
}


def near(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)


def test_every_case_is_compared():
    assert RECORDED["policy"].keys() == POLICY.keys()
    assert RECORDED["preferences"].keys() == PREFERENCES.keys()


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages(scale):
    rewards = np.float32(RECORDED["rewards"])
    wanted = np.float32(RECORDED["group_advantages"][scale])
    if scale == "group":  # TRL adds 1e-4 to the deviation
        deviation = rewards.reshape(-1, 4).std(axis=1, ddof=1).repeat(4)
        wanted *= 1 + 1e-4 / np.where(deviation > 1e-6, deviation, 1.0)
    near(group_advantages(rewards, 4, divide=scale == "group"), wanted)


@pytest.mark.parametrize("name", POLICY)
def test_policy_loss(name):
    wanted, config = RECORDED["policy"][name], POLICY[name]

    def loss(logp):
        return policy_loss(
            config, logp, ARRAYS["old"], ARRAYS["sampler"], ARRAYS["reference"],
            np.float32(RECORDED["advantages"]), MASK, max_length=RECORDED["max_length"],
        )  # fmt: skip

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = run(ARRAYS["logp"])
    near(value, wanted["loss"])
    near(gradient, wanted["gradient"])
    near(metrics["clip/low"], wanted["clip_ratio/low_mean"])
    near(metrics["clip/high"], wanted["clip_ratio/high_mean"])


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_loss(name):
    wanted, config = RECORDED["preferences"][name], PREFERENCES[name]
    halves = lambda array: (array[:3], array[3:])

    def loss(logp):
        arrays = (logp, MASK, ARRAYS["reference"])
        return preference_loss(config, *(half for array in arrays for half in halves(array)))

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = run(ARRAYS["logp"])
    near(value, wanted["loss"])
    near(gradient, wanted["gradient"])
    if name == "dpo":  # of "normalized", TRL's metrics are not normalized
        for ours, theirs in {
            "reward/chosen": "rewards/chosen", "reward/rejected": "rewards/rejected",
            "reward/margin": "rewards/margins", "accuracy": "rewards/accuracies",
        }.items():  # fmt: skip
            near(metrics[ours], wanted[theirs])


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_distillation_loss(divergence):
    wanted = RECORDED["distillation"][divergence]
    inputs = {name: jnp.float32(array) for name, array in wanted["inputs"].items()}
    config = DistillConfig(divergence, wanted["temperature"])
    weights = jnp.float32(wanted["mask"])

    def loss(hidden, head):
        teacher = inputs["teacher_hidden"], inputs["teacher_head"].T
        total = distillation_loss(config, hidden, head, *teacher, weights, chunk=2)
        # TRL does not multiply by the temperature's square, and takes the mean.
        return total / jnp.sum(weights) / config.temperature**2

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (to_hidden, to_head) = run(inputs["hidden"], inputs["head"].T)
    near(value, wanted["loss"])
    near(to_hidden, wanted["to_hidden"])
    near(to_head.T, wanted["to_head"])
