"""OLMoE-1B-7B. Sources: arXiv 2409.02060, table 1 and appendix B; the hub's config.

Queries and keys are normalised over all heads at once. Initial weights are a truncated normal's of
deviation 0.02 in the paper, a normal's here.
"""

from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers.published import SoftmaxTopKOptions

olmoe_1b_7b = ModelConfig(
    vocab_size=50304,
    d_model=2048,
    num_layers=16,
    attention=AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="all"),
    tie_embeddings=False,
    norm_eps=1e-5,
    init_std=0.02,
    moe=MoEConfig(
        num_experts=64,
        top_k=8,
        d_expert=1024,
        router=SoftmaxTopKOptions(balance_loss_weight=0.01, z_loss_weight=0.001),
    ),
)
