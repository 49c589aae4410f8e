"""DeepSeekMoE-16B, DeepSeek-V2-Lite, V2 and V3; R1 and R1-Zero are V3's architecture.

Sources: arXiv 2401.06066 (DeepSeekMoE), 2405.04434 (V2; appendix B for V2-Lite), 2412.19437 (V3),
2501.12948 (R1); V3's copy of the config, the others' hub configs. Balance losses and the initial
deviation are the papers': the configs carry ``aux_loss_alpha`` 0.001 and ``initializer_range`` 0.02
whatever the paper says. V2 also dropped tokens by device in training; here nothing is dropped.

The rotary embedding is that of the released checkpoints, after YaRN has extended 4,096 positions
forty times; 0.707 and 1 are their ``mscale`` and ``mscale_all_dim``, so that cosine and sine keep
their size and the softmax scale grows. Their interleaved channels are a matter of layout only.
"""

from moejax.models.attention_config import AttentionConfig, RopeConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers.published import DeepSeekMoEOptions, DeepSeekV2Options, DeepSeekV3Options


def _mla(num_heads: int, q_lora_rank: int, mscale: float) -> AttentionConfig:
    """Multi-head latent attention as all of them have it."""
    return AttentionConfig(
        kind="mla",
        num_heads=num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=512,
        nope_head_dim=128,
        rope_head_dim=64,
        v_head_dim=128,
        rope_theta=10_000.0,
        rope=RopeConfig(
            scaling="yarn", factor=40.0, original_length=4096, mscale=mscale, mscale_all_dim=mscale
        ),
    )


deepseek_moe_16b = ModelConfig(
    vocab_size=102400,
    d_model=2048,
    num_layers=28,
    d_ff=10944,
    first_k_dense=1,
    attention=AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128),
    tie_embeddings=False,
    init_std=0.006,
    moe=MoEConfig(
        num_experts=64,
        top_k=6,
        d_expert=1408,
        num_shared_experts=2,
        router=DeepSeekMoEOptions(sequence_loss_weight=0.001),
    ),
)

# Trained with the expert-level loss alone, at 0.001, and without groups (appendix B).
deepseek_v2_lite = ModelConfig(
    vocab_size=102400,
    d_model=2048,
    num_layers=27,
    d_ff=10944,
    first_k_dense=1,
    attention=_mla(num_heads=16, q_lora_rank=0, mscale=0.707),
    tie_embeddings=False,
    init_std=0.006,
    moe=MoEConfig(
        num_experts=64,
        top_k=6,
        d_expert=1408,
        num_shared_experts=2,
        router=DeepSeekV2Options(
            routed_scale=1.0,
            sequence_loss_weight=0.001,
            device_loss_weight=0.0,
            communication_loss_weight=0.0,
        ),
    ),
)

deepseek_v2 = ModelConfig(
    vocab_size=102400,
    d_model=5120,
    num_layers=60,
    d_ff=12288,
    first_k_dense=1,
    attention=_mla(num_heads=128, q_lora_rank=1536, mscale=0.707),
    tie_embeddings=False,
    init_std=0.006,
    moe=MoEConfig(
        num_experts=160,
        top_k=6,
        d_expert=1536,
        num_shared_experts=2,
        router=DeepSeekV2Options(
            num_groups=8,
            groups_kept=3,
            routed_scale=16.0,
            sequence_loss_weight=0.003,
            device_loss_weight=0.05,
            communication_loss_weight=0.02,
        ),
    ),
)

deepseek_v3 = ModelConfig(
    vocab_size=129280,
    d_model=7168,
    num_layers=61,
    d_ff=18432,
    first_k_dense=3,
    mtp_depth=1,
    attention=_mla(num_heads=128, q_lora_rank=1536, mscale=1.0),
    tie_embeddings=False,
    init_std=0.006,
    moe=MoEConfig(
        num_experts=256,
        top_k=8,
        d_expert=2048,
        num_shared_experts=1,
        router=DeepSeekV3Options(
            num_groups=8,
            groups_kept=4,
            routed_scale=2.5,
            bias_step=0.001,
            sequence_loss_weight=1e-4,
        ),
    ),
)
