"""Presets are plain configs; their counts are checked in tests/cost/test_counts.py."""

import re

import pytest

from moejax.models import ModelConfig
from moejax.models.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_every_field_that_counts(name):
    config = PRESETS[name]
    assert isinstance(config, ModelConfig)
    assert re.fullmatch(r"[a-z0-9_]+", name)
    assert config.attention.num_kv_heads and config.attention.head_dim
    assert config.layers("dense") == 0 or config.d_ff
    assert not config.tie_embeddings


def test_deepseek_moe_16b_is_one_dense_layer_then_moe():
    config = PRESETS["deepseek_moe_16b"]
    assert config.layout == ((("dense",), 1), (("moe",), 27))
    assert not config.moe.router.normalize_gates


def test_mixtral_renormalises_its_gates():
    assert PRESETS["mixtral_8x7b"].moe.router.normalize_gates
