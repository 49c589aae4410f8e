"""Dense models: Llama, Qwen2 and Qwen3. Source: their classes in Transformers."""

import dataclasses
from typing import Any

from moejax.interop.config_map import (
    check_divides,
    layer_kinds,
    read_heads,
    read_layer_types,
    read_model,
    read_rope,
    write_heads,
    write_model,
    write_rope,
)  # fmt: skip
from moejax.interop.families.family import Family
from moejax.interop.families.shared import DENSE, GQA, tables
from moejax.interop.fields import Fields
from moejax.models import AttentionConfig, ModelConfig


def _read_llama(fields: Fields) -> ModelConfig:
    fields.only("mlp_bias", False)
    check_divides(fields)
    theta, rope = read_rope(fields, 10_000.0)
    bias = "all" if fields.get("attention_bias", bool, False) else "none"
    attention = AttentionConfig(**read_heads(fields), bias=bias, rope_theta=theta, rope=rope)
    return read_model(fields, attention)


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_model(config), **write_heads(config), **write_rope(config.attention),
        "attention_bias": config.attention.bias == "all", "mlp_bias": False,
    }  # fmt: skip


LLAMA = Family(
    "llama", "LlamaForCausalLM", _read_llama, _write_llama, lambda _: tables({**GQA, **DENSE})
)


def read_qwen_windows(fields: Fields) -> tuple[int, list[bool]]:
    """Positions of a window (0 for none), and whether each layer has one.

    Without ``layer_types`` the layers from ``max_window_layers`` on have one.
    """
    count = fields.size("num_hidden_layers")
    used = fields.get("use_sliding_window", bool, False)
    window, first = fields.get("sliding_window", int, 0), fields.get("max_window_layers", int, 28)
    listed = read_layer_types(fields)
    windows = listed or [used and i >= first for i in range(count)]
    if any(windows):
        fields.check(
            used and window > 0, "layer_types" if listed else "sliding_window",
            "says that layers have a window, but sliding_window or use_sliding_window does not; "
            "restore the file",
        )  # fmt: skip
    return (window if any(windows) else 0), windows


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The same fields back."""
    windows = ["window" in kind for kind in layer_kinds(config)]
    names = ["sliding_attention" if window else "full_attention" for window in windows]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": config.attention.window if any(windows) else None,
        "max_window_layers": windows.index(True) if any(windows) else len(windows),
        "layer_types": names,
    }


def _read_qwen2(fields: Fields) -> ModelConfig:
    theta, rope = read_rope(fields, 10_000.0)
    window, windows = read_qwen_windows(fields)
    attention = AttentionConfig(
        **read_heads(fields), bias="qkv", window=window, rope_theta=theta, rope=rope
    )
    return read_model(fields, attention, windows=windows)


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_model(config),
        **write_heads(config),
        **write_rope(config.attention),
        **write_windows(config),
    }


def _read_qwen3(fields: Fields) -> ModelConfig:
    theta, rope = read_rope(fields, 10_000.0)
    bias = "all" if fields.get("attention_bias", bool, False) else "none"
    window, windows = read_qwen_windows(fields)
    attention = AttentionConfig(
        **read_heads(fields, head_dim=128), qk_norm="head", bias=bias, window=window,
        rope_theta=theta, rope=rope,
    )  # fmt: skip
    return read_model(fields, attention, windows=windows)


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_model(config), **write_heads(config), **write_rope(config.attention),
        **write_windows(config), "attention_bias": config.attention.bias == "all",
    }  # fmt: skip


QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=_read_qwen2,
    write=_write_qwen2,
)

QWEN3 = dataclasses.replace(
    LLAMA, model_type="qwen3", architecture="Qwen3ForCausalLM", read=_read_qwen3,
    write=_write_qwen3,
)  # fmt: skip
