"""Llama 3.1, dense. Sources: arXiv 2407.21783, table 3; copies of the three configs."""

from moejax.models.attention_config import AttentionConfig, RopeConfig
from moejax.models.model_config import ModelConfig


def _llama3_1(d_model: int, num_layers: int, d_ff: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256,
        d_model=d_model,
        num_layers=num_layers,
        d_ff=d_ff,
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=500_000.0,
            rope=RopeConfig(
                scaling="llama3",
                factor=8.0,
                original_length=8192,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
            ),
        ),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


llama3_1_8b = _llama3_1(d_model=4096, num_layers=32, d_ff=14336, num_heads=32)
llama3_1_70b = _llama3_1(d_model=8192, num_layers=80, d_ff=28672, num_heads=64)
llama3_1_405b = _llama3_1(d_model=16384, num_layers=126, d_ff=53248, num_heads=128)
