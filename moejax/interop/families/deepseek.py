"""DeepSeekMoE-16B, V2, V3 (R1 is V3), and Kimi-K2, which is V3 with other numbers.

Sources of names and fields: the released config.json files and the code released beside them;
Transformers has the same for V2 and V3, and no class for the 16B model.
"""

from typing import Any

from moejax.interop.config_map import (
    check_divides,
    layer_kinds,
    read_heads,
    read_model,
    read_rope,
    read_top_k,
    write_heads,
    write_model,
    write_rope,
)  # fmt: skip
from moejax.interop.families.family import Family
from moejax.interop.families.shared import (
    DENSE,
    FUSED_EXPERTS,
    GQA,
    experts,
    mla,
    shared_experts,
    tables,
)  # fmt: skip
from moejax.interop.fields import Fields
from moejax.models import AttentionConfig, ModelConfig
from moejax.moe import MoEConfig, router_options


def dense_layers(fields: Fields, default: int) -> list[bool]:
    """Which layers are dense: the first ones, and all but every ``moe_layer_freq``-th."""
    count, every = fields.size("num_hidden_layers"), fields.size("moe_layer_freq", 1)
    first = fields.get("first_k_dense_replace", int, default)
    fields.check(
        0 <= first <= count, "first_k_dense_replace",
        f"must be from 0 to num_hidden_layers = {count}; restore the file",
    )  # fmt: skip
    return [i < first or i % every != 0 for i in range(count)]


def read_moe(fields: Fields, router: dict[str, Any]) -> MoEConfig:
    """Experts and router; the router's options are completed by the losses."""
    count, top_k = read_top_k(fields, "n_routed_experts", "num_local_experts", "num_experts")
    fields.idle("aux_loss_alpha", "seq_aux", "router_aux_loss_coef")
    by_sequence = fields.get("seq_aux", bool, True)
    weight = fields.get("aux_loss_alpha", float, None)
    if weight is not None:
        router["sequence_loss_weight" if by_sequence else "balance_loss_weight"] = weight
        router["balance_loss_weight" if by_sequence else "sequence_loss_weight"] = 0.0
    if router.get("num_groups", 1) > 1:
        fields.check(
            count % router["num_groups"] == 0, "n_group",
            f"does not divide the number of experts, {count}; restore the file",
        )  # fmt: skip
        fields.check(
            router["groups_kept"] <= router["num_groups"], "topk_group",
            f"is above n_group = {router['num_groups']}; restore the file",
        )  # fmt: skip
    return MoEConfig(
        count, top_k, fields.size("moe_intermediate_size"), router=router_options(router),
        num_shared_experts=fields.get("n_shared_experts", int, 0),
    )  # fmt: skip


def write_moe(config: ModelConfig) -> dict[str, Any]:
    """The fields of experts and router back."""
    moe, kinds = config.moe, layer_kinds(config)
    router = moe.router
    dense = next((i for i, kind in enumerate(kinds) if "moe" in kind), len(kinds))
    sequence = getattr(router, "sequence_loss_weight", 0.0)
    return {
        "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.num_shared_experts, "moe_layer_freq": 1,
        "moe_intermediate_size": moe.d_expert, "first_k_dense_replace": dense,
        "norm_topk_prob": getattr(router, "normalize_gates", False),
        "seq_aux": sequence > 0 or not getattr(router, "balance_loss_weight", 0.0),
        "aux_loss_alpha": sequence or getattr(router, "balance_loss_weight", 0.0),
    }  # fmt: skip


def read_mtp(fields: Fields) -> int:
    """How many MTP modules there are, under either of the field's two names."""
    return fields.get("num_nextn_predict_layers", int, fields.get("num_mtp_layers", int, 0))


def read_groups(fields: Fields, score: str, groups: int = 1, kept: int = 1) -> dict[str, Any]:
    """The router's groups; the numbers are the family's where the file states none."""
    groups, kept = fields.size("n_group", groups), fields.size("topk_group", kept)
    return {"num_groups": groups, "groups_kept": kept, "group_score": score}


def write_groups(config: ModelConfig) -> dict[str, Any]:
    """The same fields back."""
    router = config.moe.router
    return {
        "n_group": getattr(router, "num_groups", 1),
        "topk_group": getattr(router, "groups_kept", 1),
        "routed_scaling_factor": getattr(router, "routed_scale", 1.0),
    }  # fmt: skip


def _read_mla(fields: Fields) -> AttentionConfig:
    theta, rope = read_rope(fields, 10_000.0)
    heads, kv_heads = fields.size("num_attention_heads"), fields.size("num_key_value_heads", None)
    fields.check(
        kv_heads in (None, heads), "num_key_value_heads",
        f"must be num_attention_heads = {heads}, since latent attention has a key for each head",
    )  # fmt: skip
    nope, turned = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    whole = fields.size("qk_head_dim", nope + turned)
    fields.check(
        whole == nope + turned, "qk_head_dim",
        f"must be qk_nope_head_dim + qk_rope_head_dim = {nope + turned}; restore the file",
    )  # fmt: skip
    fields.idle("head_dim")  # Transformers writes qk_rope_head_dim there
    return AttentionConfig(
        kind="mla", num_heads=heads, q_lora_rank=fields.get("q_lora_rank", int, 0),
        kv_lora_rank=fields.size("kv_lora_rank"), nope_head_dim=nope, rope_head_dim=turned,
        v_head_dim=fields.size("v_head_dim"), rope_theta=theta, rope=rope,
        bias="all" if fields.get("attention_bias", bool, False) else "none",
    )  # fmt: skip


def _write_mla(config: ModelConfig) -> dict[str, Any]:
    a = config.attention
    return {
        **write_rope(a), "num_attention_heads": a.num_heads, "num_key_value_heads": a.num_heads,
        "q_lora_rank": a.q_lora_rank or None, "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.nope_head_dim, "qk_rope_head_dim": a.rope_head_dim,
        "v_head_dim": a.v_head_dim, "attention_bias": a.bias == "all",
    }  # fmt: skip


def _read_16b(fields: Fields) -> ModelConfig:
    theta, rope = read_rope(fields, 10_000.0)
    fields.only("scoring_func", "softmax")
    fields.only("mlp_bias", False)
    normalize = fields.get("norm_topk_prob", bool, False)
    bias = "all" if fields.get("attention_bias", bool, False) else "none"
    attention = AttentionConfig(**read_heads(fields), bias=bias, rope_theta=theta, rope=rope)
    moe = read_moe(fields, {"name": "deepseek_moe", "normalize_gates": normalize})
    return read_model(fields, attention, moe=moe, dense=dense_layers(fields, 0))


def _write_16b(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_model(config), **write_heads(config), **write_rope(config.attention),
        **write_moe(config), "attention_bias": config.attention.bias == "all",
        "scoring_func": "softmax",
    }  # fmt: skip


def _moe_tables(attention, mtp: bool = False):
    layer = {**attention, **DENSE, **shared_experts()}
    return tables({**layer, **experts()}, {**layer, **FUSED_EXPERTS}, mtp=mtp)


DEEPSEEK_MOE = Family(
    "deepseek", "DeepseekForCausalLM", _read_16b, _write_16b, lambda _: _moe_tables(GQA)
)


def _read_v2(fields: Fields) -> ModelConfig:
    fields.only("scoring_func", "softmax")
    fields.only("mlp_bias", False)
    fields.only(
        "norm_topk_prob", False
    )  # codes differ in what the scale does to renormalised gates
    check_divides(fields)
    method = fields.get("topk_method", str, "greedy")
    router: dict[str, Any] = {"name": "deepseek_v2"}
    fields.idle("n_group", "topk_group")
    if method == "group_limited_greedy":
        router |= read_groups(fields, "max")
    elif method != "greedy":
        fields.refuse("topk_method", "moejax computes 'greedy' and 'group_limited_greedy' here")
    router["routed_scale"] = fields.get("routed_scaling_factor", float, 1.0)
    attention, moe = _read_mla(fields), read_moe(fields, router)
    return read_model(fields, attention, moe=moe, dense=dense_layers(fields, 0))


def _write_v2(config: ModelConfig) -> dict[str, Any]:
    groups = write_groups(config)
    limited = groups["topk_group"] < groups["n_group"]
    return {
        **write_model(config), **_write_mla(config), **write_moe(config), **groups,
        "norm_topk_prob": False, "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if limited else "greedy",
    }  # fmt: skip


def _turned(values) -> int:
    """Rotary channels stored as pairs."""
    return values["qk_rope_head_dim"] if values.get("rope_interleave") is not False else 0


DEEPSEEK_V2 = Family(
    "deepseek_v2", "DeepseekV2ForCausalLM", _read_v2, _write_v2,
    lambda values: _moe_tables(mla(values["qk_rope_head_dim"])),
)  # fmt: skip


def _read_v3(fields: Fields) -> ModelConfig:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.get("rope_interleave", bool, True)
    router = {
        "name": "deepseek_v3", **read_groups(fields, "top2", 8, 4),
        "normalize_gates": fields.get("norm_topk_prob", bool, True),
        "routed_scale": fields.get("routed_scaling_factor", float, 2.5),
    }  # fmt: skip
    attention, moe = _read_mla(fields), read_moe(fields, router)
    return read_model(
        fields, attention, moe=moe, dense=dense_layers(fields, 3), mtp_depth=read_mtp(fields)
    )


def _write_v3(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_model(config), **_write_mla(config), **write_moe(config), **write_groups(config),
        "norm_topk_prob": getattr(config.moe.router, "normalize_gates", True),
        "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "num_nextn_predict_layers": config.mtp_depth,
    }  # fmt: skip


DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", _read_v3, _write_v3,
    lambda values: _moe_tables(mla(_turned(values)), mtp=True), also=("kimi_k2",),
)  # fmt: skip
