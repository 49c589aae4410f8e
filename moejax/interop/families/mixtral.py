"""Mixtral and OLMoE. Source of names and fields: their classes in Transformers."""

from typing import Any

from moejax.interop.config_map import (
    check_divides,
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
from moejax.interop.families.shared import FUSED_EXPERTS, GQA, experts, tables
from moejax.interop.fields import Fields
from moejax.models import AttentionConfig, ModelConfig
from moejax.moe import MoEConfig, router_options


def _read_mixtral(fields: Fields) -> ModelConfig:
    theta, rope = read_rope(fields, 1_000_000.0)
    window = fields.get("sliding_window", int, 0)
    attention = AttentionConfig(**read_heads(fields), window=window, rope_theta=theta, rope=rope)
    count, top_k = read_top_k(fields, "num_local_experts", "num_experts")
    jitter = fields.get("router_jitter_noise", float, 0.0)
    router = {"name": "mixtral", "jitter": jitter, **read_weight(fields, "router_aux_loss_coef")}
    moe = MoEConfig(count, top_k, fields.size("intermediate_size"), router=router_options(router))
    windows = [window > 0] * fields.size("num_hidden_layers")
    return read_model(fields, attention, moe=moe, windows=windows, norm_eps=1e-5)


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return {
        **write_model(config), **write_heads(config), **write_rope(config.attention),
        "intermediate_size": moe.d_expert, "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "output_router_logits": False,
        "sliding_window": config.attention.window if config.layers("window") else None,
        "router_aux_loss_coef": getattr(moe.router, "balance_loss_weight", 0.0),
    }  # fmt: skip


MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral,
    lambda _: tables(
        {**GQA, **experts("block_sparse_moe", "w1", "w3", "w2")}, {**GQA, **FUSED_EXPERTS}
    ),
)  # fmt: skip


def _read_olmoe(fields: Fields) -> ModelConfig:
    fields.only("clip_qkv")
    check_divides(fields, own_width=False)
    theta, rope = read_rope(fields, 10_000.0)
    bias = "all" if fields.get("attention_bias", bool, False) else "none"
    attention = AttentionConfig(
        **read_heads(fields), qk_norm="all", bias=bias, rope_theta=theta, rope=rope
    )
    experts, top_k = read_top_k(fields, "num_experts", "num_local_experts")
    router = {
        "name": "softmax_topk", "normalize_gates": fields.get("norm_topk_prob", bool, False),
        **read_weight(fields, "router_aux_loss_coef"),
    }  # fmt: skip
    moe = MoEConfig(experts, top_k, fields.size("intermediate_size"), router=router_options(router))
    return read_model(fields, attention, moe=moe, norm_eps=1e-5)


def _write_olmoe(config: ModelConfig) -> dict[str, Any]:
    moe, heads = config.moe, write_heads(config)
    return {
        **write_model(config), **heads, **write_rope(config.attention),
        "attention_bias": config.attention.bias == "all", "clip_qkv": None,
        "intermediate_size": moe.d_expert, "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "output_router_logits": False,
        "norm_topk_prob": getattr(moe.router, "normalize_gates", False),
        "router_aux_loss_coef": getattr(moe.router, "balance_loss_weight", 0.0),
    }  # fmt: skip


OLMOE = Family(
    "olmoe", "OlmoeForCausalLM", _read_olmoe, _write_olmoe,
    lambda _: tables({**GQA, **experts()}, {**GQA, **FUSED_EXPERTS}),
)  # fmt: skip
