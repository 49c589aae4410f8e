"""Routing strategies, one file a family, and the registry that a config's ``router.name`` names."""

from moejax.moe.routers.base import Router, RouterCounts, RouterInputs, RouterOptions, Routing
from moejax.moe.routers.deepseek_v3 import DeepSeekV3Options, DeepSeekV3Router
from moejax.moe.routers.softmax_topk import SoftmaxTopKOptions, SoftmaxTopKRouter

REGISTRY: dict[str, type[Router]] = {
    "deepseek_v3": DeepSeekV3Router,
    "softmax_topk": SoftmaxTopKRouter,
}

__all__ = [
    "REGISTRY",
    "DeepSeekV3Options",
    "DeepSeekV3Router",
    "Router",
    "RouterCounts",
    "RouterInputs",
    "RouterOptions",
    "Routing",
    "SoftmaxTopKOptions",
    "SoftmaxTopKRouter",
]
