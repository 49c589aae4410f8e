"""Kimi-K2: DeepSeek-V3's architecture with half the heads, 384 experts and no groups.

Sources: arXiv 2507.20534, section 2.3 and table 2; copy of the Instruct checkpoint's config of
July 2025 (128K positions, YaRN factor 32; that of September has factor 64). The report names no
weight of a balance loss; V3's stands here.
"""

from moejax.models.attention_config import AttentionConfig, RopeConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers.published import KimiK2Options

kimi_k2 = ModelConfig(
    vocab_size=163840,
    d_model=7168,
    num_layers=61,
    d_ff=18432,
    first_k_dense=1,
    attention=AttentionConfig(
        kind="mla",
        num_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        nope_head_dim=128,
        rope_head_dim=64,
        v_head_dim=128,
        rope_theta=50_000.0,
        rope=RopeConfig(
            scaling="yarn",
            factor=32.0,
            original_length=4096,
            beta_fast=1.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
    tie_embeddings=False,
    moe=MoEConfig(
        num_experts=384,
        top_k=8,
        d_expert=2048,
        num_shared_experts=1,
        router=KimiK2Options(routed_scale=2.827),
    ),
)
