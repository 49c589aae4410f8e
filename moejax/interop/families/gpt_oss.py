"""gpt-oss. Source of names and fields: its class in Transformers."""

from typing import Any

from moejax.interop.config_map import (
    layer_kinds,
    read_heads,
    read_layer_types,
    read_model,
    read_rope,
    read_top_k,
    write_heads,
    write_model,
    write_rope,
)  # fmt: skip
from moejax.interop.families.family import Family
from moejax.interop.families.shared import GQA, tables
from moejax.interop.fields import Fields
from moejax.interop.tables import Rule
from moejax.interop.tensors import LINEAR, Axes
from moejax.models import AttentionConfig, ModelConfig
from moejax.moe import MoEConfig, router_options


def _read(fields: Fields) -> ModelConfig:
    fields.only("swiglu_limit", 7.0)
    fields.only("swiglu_alpha", 1.702)
    fields.only("attention_bias", True)
    fields.check(
        bool(fields.values.get("rope_parameters") or fields.values.get("rope_scaling")),
        "rope_scaling", "has to be there, if only as {'rope_type': 'default'}: without it "
        "Transformers takes YaRN by 32; restore the file",
    )  # fmt: skip
    fields.idle("initial_context_length", "experts_per_token", "router_aux_loss_coef")
    theta, rope = read_rope(fields, 150_000.0)
    count = fields.size("num_hidden_layers")
    windows = read_layer_types(fields) or [i % 2 == 0 for i in range(count)]
    window = fields.size("sliding_window", 128)
    attention = AttentionConfig(
        **read_heads(fields, head_dim=64), bias="all", sinks=True, window=window, rope_theta=theta,
        rope=rope,
    )  # fmt: skip
    experts, top_k = read_top_k(fields, "num_local_experts", "num_experts")
    moe = MoEConfig(
        experts, top_k, fields.size("intermediate_size"), activation="clamped_swiglu",
        expert_bias=True, router=router_options({"name": "gpt_oss"}),
    )  # fmt: skip
    return read_model(fields, attention, moe=moe, windows=windows, norm_eps=1e-5)


def _write(config: ModelConfig) -> dict[str, Any]:
    moe, windows = config.moe, ["window" in kind for kind in layer_kinds(config)]
    rope = write_rope(config.attention)
    rope["rope_scaling"] = rope["rope_scaling"] or {"rope_type": "default"}  # null means YaRN
    names = ["sliding_attention" if window else "full_attention" for window in windows]
    return {
        **write_model(config), **write_heads(config), **rope,
        "intermediate_size": moe.d_expert, "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "attention_bias": True, "swiglu_limit": 7.0,
        "sliding_window": config.attention.window or None, "layer_types": names,
        "output_router_logits": False,
    }  # fmt: skip


# Gate and up columns by turns: axis 2 is (F, 2).
_LAYER = {
    **GQA,
    "mlp.router.weight": Rule("moe/router/kernel", LINEAR),
    "mlp.router.bias": Rule("moe/router/logit_bias"),
    "mlp.experts.gate_up_proj": Rule(
        "moe/experts/gate_up", Axes((0, 1, 3, 2), split=2, gate_first=False)
    ),
    "mlp.experts.gate_up_proj_bias": Rule(
        "moe/experts/gate_up_bias", Axes((0, 2, 1), split=1, gate_first=False)
    ),
    "mlp.experts.down_proj": Rule("moe/experts/down"),
    "mlp.experts.down_proj_bias": Rule("moe/experts/down_bias"),
}

GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _read, _write, lambda _: tables(_LAYER))
