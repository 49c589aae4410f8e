"""GLM-4.5 and its kin. Source of names and fields: its class in Transformers."""

from typing import Any

from moejax.interop.config_map import (
    read_heads,
    read_model,
    read_rope,
    write_heads,
    write_model,
    write_rope,
)
from moejax.interop.families.deepseek import (
    dense_layers,
    read_groups,
    read_moe,
    read_mtp,
    write_groups,
    write_moe,
)  # fmt: skip
from moejax.interop.families.family import Family
from moejax.interop.families.shared import (
    DENSE,
    FUSED_EXPERTS,
    GQA,
    experts,
    shared_experts,
    tables,
)  # fmt: skip
from moejax.interop.fields import Fields
from moejax.models import AttentionConfig, ModelConfig


def _read(fields: Fields) -> ModelConfig:
    theta, rope = read_rope(fields, 10_000.0, fraction=0.5)
    attention = AttentionConfig(
        **read_heads(fields), rope_theta=theta, rope=rope,
        bias="qkv" if fields.get("attention_bias", bool, False) else "none",
        qk_norm="head" if fields.get("use_qk_norm", bool, False) else "none",
    )  # fmt: skip
    router = {
        "name": "deepseek_v3", **read_groups(fields, "top2"),
        "normalize_gates": fields.get("norm_topk_prob", bool, True),
        "routed_scale": fields.get("routed_scaling_factor", float, 1.0),
    }  # fmt: skip
    return read_model(
        fields, attention, moe=read_moe(fields, router), dense=dense_layers(fields, 1),
        norm_eps=1e-5, mtp_depth=read_mtp(fields),
    )  # fmt: skip


def _write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = config.attention, write_moe(config)
    for name in ("moe_layer_freq", "seq_aux", "aux_loss_alpha"):
        del moe[name]
    return {
        **write_model(config), **write_heads(config), **write_rope(attention), **moe,
        **write_groups(config), "partial_rotary_factor": attention.rope.fraction,
        "attention_bias": attention.bias == "qkv", "use_qk_norm": attention.qk_norm == "head",
        "num_nextn_predict_layers": config.mtp_depth,
    }  # fmt: skip


_LAYER = {**GQA, **DENSE, **shared_experts()}

GLM4_MOE = Family(
    "glm4_moe", "Glm4MoeForCausalLM", _read, _write,
    lambda _: tables({**_LAYER, **experts()}, {**_LAYER, **FUSED_EXPERTS}, mtp=True),
)  # fmt: skip
