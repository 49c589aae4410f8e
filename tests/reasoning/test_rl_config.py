"""Presets, single fields over them, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.config import ConfigError, build, to_dict
from moejax.reasoning.rl_config import PRESETS, RLConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_every_field(name):
    full = RLConfig(name).resolved()
    values = to_dict(full)
    assert None not in values.values()
    assert {"algorithm": name, **PRESETS[name]} == values
    assert full.resolved() == full
    assert build(RLConfig, values, "rl") == full


def test_the_recipes_differ_as_published():
    grpo, r1, dr_grpo, dapo, gspo = (RLConfig(name).resolved() for name in PRESETS)
    assert (grpo.aggregate, grpo.advantage_std, grpo.kl_weight) == ("sequence_mean", True, 0.04)
    assert (r1.clip_high, r1.kl_weight, r1.reference_every, r1.group_size) == (10, 1e-3, 400, 16)
    assert (dr_grpo.aggregate, dr_grpo.advantage_std, dr_grpo.kl_weight) == ("constant", False, 0)
    assert (dapo.aggregate, dapo.clip_low, dapo.clip_high) == ("token_mean", 0.2, 0.28)
    assert dapo.dynamic_sampling and dapo.overlong_buffer == 4096 / 20480 and not dapo.kl_weight
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high) == ("sequence", 3e-4, 4e-4)


@given(st.sampled_from(sorted(PRESETS)), st.integers(2, 99), st.floats(0.01, 1.0))
def test_a_field_overrides_its_preset_and_no_other(name, size, clip):
    full = RLConfig(name, group_size=size, clip_low=clip).resolved()
    assert to_dict(full) == {
        "algorithm": name, **PRESETS[name], "group_size": size, "clip_low": clip
    }  # fmt: skip


def test_fields_that_follow_another():
    assert RLConfig("r1", kl_weight=0.0).resolved().reference_every == 0
    assert RLConfig("dapo", overlong_buffer=0.0).resolved().overlong_penalty == 0
    assert RLConfig("dapo", overlong_penalty=0.0).resolved().overlong_buffer == 0
    token = RLConfig("gspo", ratio="token", clip_low=0.2, clip_high=0.2)
    assert token.resolved().ratio == "token"


REFUSED = [
    ("rl.group_size", dict(group_size=1)),
    ("rl.clip_low", dict(clip_low=10.0)),
    ("rl.clip_low", dict(clip_low=0.0)),
    ("rl.clip_high", dict(clip_high=-0.1)),
    ("rl.kl_weight", dict(kl_weight=-1e-3)),
    ("rl.entropy_weight", dict(entropy_weight=-0.1)),
    ("rl.temperature", dict(temperature=0.0)),
    ("rl.epochs", dict(epochs=0)),
    ("rl.minibatches", dict(minibatches=0)),
    ("rl.truncated_is", dict(truncated_is=0.5)),
    ("rl.overlong_buffer", dict(overlong_buffer=1.5, overlong_penalty=1.0)),
    ("rl.overlong_buffer", dict(overlong_buffer=0.2)),
    ("rl.overlong_penalty", dict(overlong_penalty=1.0)),
    ("rl.reference_every", dict(kl_weight=0.0, reference_every=400)),
    ("rl.ratio", dict(ratio="sequence")),
    ("rl.ratio", dict(algorithm="gspo", ratio="token", clip_low=0.2)),
    ("rl.algorithm", dict(algorithm="ppo")),
    ("rl.routing_replay", dict(routing_replay="sampler")),
]


@pytest.mark.parametrize("field, values", REFUSED)
def test_refused_in_one_line_that_names_the_field(field, values):
    with pytest.raises(ConfigError) as error:
        build(RLConfig, values, "rl")
    assert error.value.field == field
    assert "\n" not in str(error.value)


def test_fields_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RLConfig().group_size = 4
