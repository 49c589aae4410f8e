"""Parts of tables that several families share."""

from moejax.interop.tables import GATE, UP, Rule, Table
from moejax.interop.tensors import LINEAR, VECTOR, Axes, Linear, Vector

OUTER = {
    "model.embed_tokens.weight": Rule("embedding"),
    "model.norm.weight": Rule("final_norm/scale"),
    "lm_head.weight": Rule("head", LINEAR),
}
# Some checkpoints hold the head though it is tied.
TIED_HEAD = {"lm_head.weight": "model.embed_tokens.weight"}

NORMS = {
    "input_layernorm.weight": Rule("attention_norm/scale"),
    "post_attention_layernorm.weight": Rule("ffn_norm/scale"),
}

GQA = {
    "self_attn.q_proj.weight": Rule("attention/query/kernel", LINEAR),
    "self_attn.q_proj.bias": Rule("attention/query/bias", VECTOR),
    "self_attn.k_proj.weight": Rule("attention/key/kernel", LINEAR),
    "self_attn.k_proj.bias": Rule("attention/key/bias", VECTOR),
    "self_attn.v_proj.weight": Rule("attention/value/kernel", LINEAR),
    "self_attn.v_proj.bias": Rule("attention/value/bias", VECTOR),
    "self_attn.o_proj.weight": Rule("attention/out/kernel", Linear(inputs=2)),
    "self_attn.o_proj.bias": Rule("attention/out/bias"),
    "self_attn.q_norm.weight": Rule("attention/query_norm/scale"),
    "self_attn.k_norm.weight": Rule("attention/key_norm/scale"),
    "self_attn.sinks": Rule("attention/sinks"),
}

DENSE = {
    "mlp.gate_proj.weight": Rule("ffn/gate_up", LINEAR, GATE),
    "mlp.up_proj.weight": Rule("ffn/gate_up", LINEAR, UP),
    "mlp.down_proj.weight": Rule("ffn/down", LINEAR),
}


def mla(turned: int) -> dict[str, Rule]:
    """Multi-head latent attention; ``turned`` rotary channels are stored as pairs (0: halves)."""
    return {
        "self_attn.q_proj.weight": Rule("attention/query/kernel", Linear(turned=turned)),
        "self_attn.q_a_proj.weight": Rule("attention/query_down/kernel", LINEAR),
        "self_attn.q_a_proj.bias": Rule("attention/query_down/bias"),
        "self_attn.q_a_layernorm.weight": Rule("attention/query_norm/scale"),
        "self_attn.q_b_proj.weight": Rule("attention/query_up/kernel", Linear(turned=turned)),
        "self_attn.kv_a_proj_with_mqa.weight": Rule(
            "attention/kv_down/kernel", Linear(turned=turned)
        ),
        "self_attn.kv_a_proj_with_mqa.bias": Rule("attention/kv_down/bias", Vector(turned)),
        "self_attn.kv_a_layernorm.weight": Rule("attention/kv_norm/scale"),
        "self_attn.kv_b_proj.weight": Rule("attention/kv_up/kernel", LINEAR),
        "self_attn.o_proj.weight": Rule("attention/out/kernel", Linear(inputs=2)),
        "self_attn.o_proj.bias": Rule("attention/out/bias"),
    }


def experts(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, Rule]:
    """Router and experts, a matrix each: the layout of released checkpoints."""
    return {
        f"{block}.gate.weight": Rule("moe/router/kernel", LINEAR),
        f"{block}.gate.e_score_correction_bias": Rule("moe/router/bias"),
        f"{block}.experts.{{e}}.{gate}.weight": Rule("moe/experts/gate_up", LINEAR, GATE),
        f"{block}.experts.{{e}}.{up}.weight": Rule("moe/experts/gate_up", LINEAR, UP),
        f"{block}.experts.{{e}}.{down}.weight": Rule("moe/experts/down", LINEAR),
    }


# Router and experts as Transformers 5 holds them in memory, all experts in one tensor.
FUSED_EXPERTS = {
    "mlp.gate.weight": Rule("moe/router/kernel", LINEAR),
    "mlp.gate.e_score_correction_bias": Rule("moe/router/bias"),
    "mlp.experts.gate_up_proj": Rule("moe/experts/gate_up", Axes((0, 3, 1, 2), split=1)),
    "mlp.experts.down_proj": Rule("moe/experts/down", Axes((0, 2, 1))),
}


def shared_experts(name: str = "mlp.shared_experts") -> dict[str, Rule]:
    """The experts that every token runs through, as one."""
    return {
        f"{name}.gate_proj.weight": Rule("moe/shared/gate_up", LINEAR, GATE),
        f"{name}.up_proj.weight": Rule("moe/shared/gate_up", LINEAR, UP),
        f"{name}.down_proj.weight": Rule("moe/shared/down", LINEAR),
    }


# Multi-token prediction, DeepSeek-V3's: module k stands at layer L + k.
MTP = {
    "enorm.weight": Rule("embedding_norm/scale"),
    "hnorm.weight": Rule("hidden_norm/scale"),
    "eh_proj.weight": Rule("projection/kernel", LINEAR),
    "shared_head.norm.weight": Rule("final_norm/scale"),
}
MTP_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}


def tables(*layers: dict[str, Rule], mtp: bool = False) -> tuple[Table, ...]:
    """Tables of these layers, with the usual tensors around them."""
    more = {"mtp": MTP, "mtp_copies": MTP_COPIES} if mtp else {}
    return tuple(Table(OUTER, {**NORMS, **layer}, copies=TIED_HEAD, **more) for layer in layers)
