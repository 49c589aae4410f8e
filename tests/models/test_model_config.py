"""Options of the transformer: layouts, defaults resolved, refusals."""

import pytest
import tiny

from moejax.config import ConfigError
from moejax.models import AttentionConfig, ModelConfig


def test_layouts():
    assert tiny.dense_config(num_layers=5).layout == ((("dense",), 5),)
    assert tiny.moe_config(num_layers=5, first_k_dense=2).layout == ((("dense",), 2), (("moe",), 3))
    assert tiny.moe_config(num_layers=5, first_k_dense=0).layout == ((("moe",), 5),)
    assert tiny.moe_config(num_layers=2, first_k_dense=2).layout == ((("dense",), 2),)


def test_layers_are_counted_by_kind():
    segments = ((("dense",), 1), (("dense", "moe"), 3))
    config = tiny.moe_config(num_layers=7, segments=segments)
    assert config.layout == segments
    assert (config.layers("dense"), config.layers("moe")) == (4, 3)


def test_defaults_resolved():
    assert ModelConfig(vocab_size=8, d_model=64).dense_width == 256
    # (top_k + num_shared_experts) · d_expert = (2 + 1) · 8.
    assert tiny.moe_config(d_ff=0).dense_width == 24
    assert tiny.dense_config().head_dim == 4
    assert AttentionConfig(num_heads=6).kv_heads == 6


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vocab_size": 0}, "model.vocab_size"),
        ({"d_model": 18}, "model.attention.num_heads"),
        ({"d_model": 12}, "model.attention.head_dim"),
        ({"first_k_dense": 9}, "model.first_k_dense"),
        ({"norm_eps": 0.0}, "model.norm_eps"),
        ({"segments": ((("dense",), 1),)}, "model.segments"),
        ({"segments": ((("dens",), 2),)}, "model.segments"),
        ({"segments": (((), 2),)}, "model.segments"),
        ({"segments": ((("dense",), 0),)}, "model.segments"),
        ({"segments": ((("dense",), 10**15),)}, "model.segments"),
        ({"segments": ((("moe",), 2),)}, "model.segments"),
    ],
)
def test_refusals(changes, field):
    with pytest.raises(ConfigError) as error:
        tiny.dense_config(**changes)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_attention_refusals(changes, field):
    with pytest.raises(ConfigError) as error:
        AttentionConfig(**changes)
    assert error.value.field == f"model.attention.{field}"
