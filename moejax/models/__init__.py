"""Decoder-only transformers, dense and Mixture-of-Experts."""

from moejax.models.attention_config import AttentionConfig, RopeConfig
from moejax.models.cache import init_cache
from moejax.models.model_config import ModelConfig
from moejax.models.transformer import (
    LossOutput,
    Output,
    Transformer,
    update_router_state,
)

__all__ = [
    "AttentionConfig",
    "LossOutput",
    "ModelConfig",
    "Output",
    "RopeConfig",
    "Transformer",
    "init_cache",
    "update_router_state",
]
