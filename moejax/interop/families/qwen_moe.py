"""Qwen2-MoE and Qwen3-MoE. Source of names and fields: their classes in Transformers."""

from typing import Any

from moejax.interop.config_map import (
    layer_kinds,
    read_heads,
    read_model,
    read_rope,
    read_top_k,
    read_weight,
    write_heads,
    write_model,
    write_rope,
)  # fmt: skip
from moejax.interop.families.family import Family
from moejax.interop.families.llama import read_qwen_windows, write_windows
from moejax.interop.families.shared import (
    DENSE,
    FUSED_EXPERTS,
    GQA,
    experts,
    shared_experts,
    tables,
)  # fmt: skip
from moejax.interop.fields import Fields
from moejax.interop.tables import Rule
from moejax.interop.tensors import LINEAR
from moejax.models import AttentionConfig, ModelConfig
from moejax.moe import MoEConfig, router_options


def _dense_layers(fields: Fields) -> list[bool]:
    """Which layers are dense: those listed, and all but every ``decoder_sparse_step``-th."""
    count, step = fields.size("num_hidden_layers"), fields.size("decoder_sparse_step", 1)
    only = fields.get("mlp_only_layers", list, [])
    fields.check(
        all(type(i) is int and 0 <= i < count for i in only), "mlp_only_layers",
        f"must be numbers of layers below num_hidden_layers = {count}; restore the file",
    )  # fmt: skip
    return [i in only or (i + 1) % step != 0 for i in range(count)]


def _read_moe(fields: Fields, normalize: bool, **more: Any) -> MoEConfig:
    count, top_k = read_top_k(fields, "num_experts", "num_local_experts")
    router = {
        "name": "top_k", "normalize_gates": fields.get("norm_topk_prob", bool, normalize),
        **read_weight(fields, "router_aux_loss_coef"),
    }  # fmt: skip
    width = fields.size("moe_intermediate_size")
    return MoEConfig(count, top_k, width, router=router_options(router), **more)


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    dense = [i for i, kind in enumerate(layer_kinds(config)) if "dense" in kind]
    return {
        **write_model(config), **write_heads(config), **write_rope(config.attention),
        "num_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.d_expert, "decoder_sparse_step": 1, "mlp_only_layers": dense,
        "norm_topk_prob": getattr(moe.router, "normalize_gates", False),
        "router_aux_loss_coef": getattr(moe.router, "balance_loss_weight", 0.0),
        "output_router_logits": False,
    }  # fmt: skip


def _read_qwen2(fields: Fields) -> ModelConfig:
    theta, rope = read_rope(fields, 10_000.0)
    fields.check(
        not fields.values.get("use_sliding_window") or bool(fields.values.get("layer_types")),
        "use_sliding_window", "needs layer_types beside it: codes differ in which layers it means",
    )  # fmt: skip
    window, windows = read_qwen_windows(fields)
    bias = "qkv" if fields.get("qkv_bias", bool, True) else "none"
    attention = AttentionConfig(
        **read_heads(fields), bias=bias, window=window, rope_theta=theta, rope=rope
    )
    shared, width = (
        fields.size("shared_expert_intermediate_size"),
        fields.size("moe_intermediate_size"),
    )
    fields.check(
        shared % width == 0, "shared_expert_intermediate_size",
        f"is no multiple of moe_intermediate_size = {width}, which moejax counts shared experts by",
    )  # fmt: skip
    moe = _read_moe(fields, False, num_shared_experts=shared // width, shared_gate=True)
    return read_model(fields, attention, moe=moe, dense=_dense_layers(fields), windows=windows)


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_moe(config), **write_windows(config),
        "qkv_bias": config.attention.bias == "qkv",
        "shared_expert_intermediate_size": config.moe.num_shared_experts * config.moe.d_expert,
    }  # fmt: skip


_SHARED = {
    **shared_experts("mlp.shared_expert"),
    "mlp.shared_expert_gate.weight": Rule("moe/shared_gate", LINEAR),
}

QWEN2_MOE = Family(
    "qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2, _write_qwen2,
    lambda _: tables(
        {**GQA, **DENSE, **experts(), **_SHARED}, {**GQA, **DENSE, **FUSED_EXPERTS, **_SHARED}
    ),
)  # fmt: skip


def _read_qwen3(fields: Fields) -> ModelConfig:
    theta, rope = read_rope(fields, 10_000.0)
    fields.idle("max_window_layers")  # Transformers' class ignores it
    window = fields.get("sliding_window", int, 0)
    used = fields.get("use_sliding_window", bool, False)
    fields.check(
        not used or window > 0, "use_sliding_window", "needs sliding_window beside it; restore the "
        "file",
    )  # fmt: skip
    window = window if used else 0
    bias = "all" if fields.get("attention_bias", bool, False) else "none"
    attention = AttentionConfig(
        **read_heads(fields), qk_norm="head", bias=bias, window=window, rope_theta=theta,
        rope=rope,
    )  # fmt: skip
    windows = [window > 0] * fields.size("num_hidden_layers")
    moe = _read_moe(fields, False)
    return read_model(fields, attention, moe=moe, dense=_dense_layers(fields), windows=windows)


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    window = config.attention.window if config.layers("window") else None
    return {
        **_write_moe(config), "attention_bias": config.attention.bias == "all",
        "use_sliding_window": window is not None, "sliding_window": window,
    }  # fmt: skip


QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3, _write_qwen3,
    lambda _: tables({**GQA, **DENSE, **experts()}, {**GQA, **DENSE, **FUSED_EXPERTS}),
)  # fmt: skip
