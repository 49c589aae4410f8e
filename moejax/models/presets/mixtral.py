"""Mixtral-8x7B. Sources: arXiv 2401.04088, table 1; copy of the config (loss weight 0.02)."""

from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers.published import MixtralOptions

mixtral_8x7b = ModelConfig(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1_000_000.0),
    tie_embeddings=False,
    norm_eps=1e-5,
    moe=MoEConfig(
        num_experts=8,
        top_k=2,
        d_expert=14336,
        router=MixtralOptions(balance_loss_weight=0.02),
    ),
)
