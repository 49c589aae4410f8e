"""gpt-oss-20b and gpt-oss-120b.

Sources: model card (arXiv 2508.10925, table 1); copies of both configs. Every other layer sees 128
positions, the first of them; heads have sinks, and all projections and experts biases. How the
experts were balanced is not published, so no loss is set; the configs' ``router_aux_loss_coef`` of
0.9 says nothing of it.
"""

from moejax.models.attention_config import AttentionConfig, RopeConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers.published import GptOssOptions

_ATTENTION = AttentionConfig(
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    bias="all",
    window=128,
    sinks=True,
    rope_theta=150_000.0,
    rope=RopeConfig(scaling="yarn", factor=32.0, original_length=4096, truncate=False),
)


def _gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=201088,
        d_model=2880,
        num_layers=num_layers,
        segments=((("moe_window", "moe"), num_layers // 2),),
        attention=_ATTENTION,
        tie_embeddings=False,
        norm_eps=1e-5,
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=4,
            d_expert=2880,
            activation="clamped_swiglu",
            expert_bias=True,
            router=GptOssOptions(),
        ),
    )


gpt_oss_20b = _gpt_oss(num_layers=24, num_experts=32)
gpt_oss_120b = _gpt_oss(num_layers=36, num_experts=128)
