"""Published models as plain values of ModelConfig.

Every field that decides a parameter, a FLOP or a cache byte is the released checkpoint's own (its
Hugging Face ``config.json``, not the class defaults). One deviation in the arithmetic: Llama 3.1's
checkpoints also rescale RoPE's frequencies for contexts beyond 8,192 (``rope_scaling`` "llama3"),
which has no parameters and is not expressed here. OLMoE and Qwen3 normalise queries and keys,
which today's attention does not, so they are left out.

Sources: arXiv 2407.21783 (Llama 3.1), 2401.04088 (Mixtral), 2401.06066 (DeepSeekMoE).
"""

from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers.published import DeepSeekMoEOptions, MixtralOptions

llama3_1_8b = ModelConfig(
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    d_ff=14336,
    attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=500_000.0),
    tie_embeddings=False,
    norm_eps=1e-5,
)

llama3_1_70b = ModelConfig(
    vocab_size=128256,
    d_model=8192,
    num_layers=80,
    d_ff=28672,
    attention=AttentionConfig(num_heads=64, num_kv_heads=8, head_dim=128, rope_theta=500_000.0),
    tie_embeddings=False,
    norm_eps=1e-5,
)

llama3_1_405b = ModelConfig(
    vocab_size=128256,
    d_model=16384,
    num_layers=126,
    d_ff=53248,
    attention=AttentionConfig(num_heads=128, num_kv_heads=8, head_dim=128, rope_theta=500_000.0),
    tie_embeddings=False,
    norm_eps=1e-5,
)

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
        router=MixtralOptions(),
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
    moe=MoEConfig(
        num_experts=64,
        top_k=6,
        d_expert=1408,
        num_shared_experts=2,
        router=DeepSeekMoEOptions(sequence_loss_weight=0.001),
    ),
)

PRESETS: dict[str, ModelConfig] = {
    "deepseek_moe_16b": deepseek_moe_16b,
    "llama3_1_8b": llama3_1_8b,
    "llama3_1_70b": llama3_1_70b,
    "llama3_1_405b": llama3_1_405b,
    "mixtral_8x7b": mixtral_8x7b,
}
