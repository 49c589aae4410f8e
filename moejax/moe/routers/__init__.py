"""Routing strategies, one file a family, and the registry that a config's ``router.name`` names."""

from moejax.moe.routers.base import (
    Card,
    ExpertProbe,
    Router,
    RouterCounts,
    RouterInputs,
    RouterOptions,
    Routing,
)
from moejax.moe.routers.force_balanced import ForceBalancedOptions, ForceBalancedRouter
from moejax.moe.routers.losses import LossOptions, ScoredRouter, batch_loads
from moejax.moe.routers.published import (
    DeepSeekV3Options,
    DeepSeekV3Router,
    SoftmaxTopKOptions,
    SoftmaxTopKRouter,
)
from moejax.moe.routers.registry import REGISTRY, find
from moejax.moe.routers.top_k import TopKOptions, TopKRouter
from moejax.moe.routers.trace import TraceOptions, TraceRouter

__all__ = [
    "REGISTRY",
    "Card",
    "DeepSeekV3Options",
    "DeepSeekV3Router",
    "ExpertProbe",
    "ForceBalancedOptions",
    "ForceBalancedRouter",
    "LossOptions",
    "Router",
    "RouterCounts",
    "RouterInputs",
    "RouterOptions",
    "Routing",
    "ScoredRouter",
    "SoftmaxTopKOptions",
    "SoftmaxTopKRouter",
    "TopKOptions",
    "TopKRouter",
    "TraceOptions",
    "TraceRouter",
    "batch_loads",
    "find",
]
