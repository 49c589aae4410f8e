"""Qwen1.5-MoE, Qwen2-57B-A14B, Qwen2.5-72B, and Qwen3, dense and MoE.

Sources: arXiv 2407.10671 (Qwen2, table 1), 2412.15115 (Qwen2.5), 2505.09388 (Qwen3, tables 1 and
2); copies of the configs of Qwen3-0.6B, 1.7B, 8B, 32B, 30B-A3B and 235B-A22B and of Qwen1.5-MoE's;
Qwen2-57B-A14B's shapes from a listing of its modules; Qwen3-4B, 14B and Qwen2.5-72B from the hub.
Qwen2 has biases on queries, keys and values, Qwen3 normalises queries and keys of each head
instead. Qwen3's report names the balance loss over the global batch but not its weight: the
configs' 0.001 stands here. The longer contexts that YaRN gives at serving time are not set.
"""

from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers.published import GlobalBatchOptions, SoftmaxTopKOptions


def _qwen2_attention(num_heads: int, num_kv_heads: int) -> AttentionConfig:
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        bias="qkv",
        rope_theta=1_000_000.0,
    )


def _qwen3_attention(num_heads: int, num_kv_heads: int) -> AttentionConfig:
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        qk_norm="head",
        rope_theta=1_000_000.0,
    )


def _qwen3(
    d_model: int, num_layers: int, d_ff: int, num_heads: int, tie_embeddings: bool = False
) -> ModelConfig:
    """A dense Qwen3."""
    return ModelConfig(
        vocab_size=151936,
        d_model=d_model,
        num_layers=num_layers,
        d_ff=d_ff,
        attention=_qwen3_attention(num_heads, 8),
        tie_embeddings=tie_embeddings,
    )


def _qwen3_moe(d_model: int, num_layers: int, d_expert: int, num_heads: int) -> ModelConfig:
    """A Qwen3-MoE: 128 experts, no shared one, gates renormalised."""
    return ModelConfig(
        vocab_size=151936,
        d_model=d_model,
        num_layers=num_layers,
        attention=_qwen3_attention(num_heads, 4),
        tie_embeddings=False,
        moe=MoEConfig(
            num_experts=128,
            top_k=8,
            d_expert=d_expert,
            router=GlobalBatchOptions(normalize_gates=True, global_loss_weight=0.001),
        ),
    )


def _qwen2_moe_router() -> SoftmaxTopKOptions:
    return SoftmaxTopKOptions(balance_loss_weight=0.001, z_loss_weight=0.0)


qwen1_5_moe_a2_7b = ModelConfig(
    vocab_size=151936,
    d_model=2048,
    num_layers=24,
    attention=_qwen2_attention(16, 16),
    tie_embeddings=False,
    moe=MoEConfig(
        num_experts=60,
        top_k=4,
        d_expert=1408,
        num_shared_experts=4,
        shared_gate=True,
        router=_qwen2_moe_router(),
    ),
)

qwen2_57b_a14b = ModelConfig(
    vocab_size=151936,
    d_model=3584,
    num_layers=28,
    attention=_qwen2_attention(28, 4),
    tie_embeddings=False,
    moe=MoEConfig(
        num_experts=64,
        top_k=8,
        d_expert=2560,
        num_shared_experts=8,
        shared_gate=True,
        router=_qwen2_moe_router(),
    ),
)

qwen2_5_72b = ModelConfig(
    vocab_size=152064,
    d_model=8192,
    num_layers=80,
    d_ff=29568,
    attention=_qwen2_attention(64, 8),
    tie_embeddings=False,
    norm_eps=1e-5,
)

qwen3_0_6b = _qwen3(1024, 28, 3072, 16, tie_embeddings=True)
qwen3_1_7b = _qwen3(2048, 28, 6144, 16, tie_embeddings=True)
qwen3_4b = _qwen3(2560, 36, 9728, 32, tie_embeddings=True)
qwen3_8b = _qwen3(4096, 36, 12288, 32)
qwen3_14b = _qwen3(5120, 40, 17408, 40)
qwen3_32b = _qwen3(5120, 64, 25600, 64)
qwen3_30b_a3b = _qwen3_moe(d_model=2048, num_layers=48, d_expert=768, num_heads=32)
qwen3_235b_a22b = _qwen3_moe(d_model=4096, num_layers=94, d_expert=1536, num_heads=64)
