"""GLM-4.5 (355B-A32B) and GLM-4.5-Air (106B-A12B).

Sources: arXiv 2508.06471, table 1 and section 2.4 (bias step 0.001, sequence loss 1e-4); sizes,
q/k norm, biases and rotary share compared with the launch scripts of slime, its authors' framework;
norm epsilon and the MTP module from the hub. Half of a head's channels turn. The report counts the
MTP module, but neither embedding nor head.
"""

from moejax.models.attention_config import AttentionConfig, RopeConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers.published import DeepSeekV3Options

glm4_5 = ModelConfig(
    vocab_size=151552,
    d_model=5120,
    num_layers=92,
    d_ff=12288,
    first_k_dense=3,
    mtp_depth=1,
    attention=AttentionConfig(
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        qk_norm="head",
        bias="qkv",
        rope_theta=1_000_000.0,
        rope=RopeConfig(fraction=0.5),
    ),
    tie_embeddings=False,
    norm_eps=1e-5,
    moe=MoEConfig(
        num_experts=160,
        top_k=8,
        d_expert=1536,
        num_shared_experts=1,
        router=DeepSeekV3Options(routed_scale=2.5, bias_step=0.001, sequence_loss_weight=1e-4),
    ),
)

glm4_5_air = ModelConfig(
    vocab_size=151552,
    d_model=4096,
    num_layers=46,
    d_ff=10944,
    first_k_dense=1,
    mtp_depth=1,
    attention=AttentionConfig(
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        bias="qkv",
        rope_theta=1_000_000.0,
        rope=RopeConfig(fraction=0.5),
    ),
    tie_embeddings=False,
    norm_eps=1e-5,
    moe=MoEConfig(
        num_experts=128,
        top_k=8,
        d_expert=1408,
        num_shared_experts=1,
        router=DeepSeekV3Options(routed_scale=1.0, bias_step=0.001, sequence_loss_weight=1e-4),
    ),
)
