"""Routing strategies, one file a family, and the registry that a config's ``router.name`` names."""

from moejax.moe.routers.base import Router, RouterCounts, RouterInputs, RouterOptions, Routing
from moejax.moe.routers.deepseek_v3 import DeepSeekV3Options, DeepSeekV3Router
from moejax.moe.routers.force_balanced import ForceBalancedOptions, ForceBalancedRouter
from moejax.moe.routers.softmax_topk import SoftmaxTopKOptions, SoftmaxTopKRouter
from moejax.moe.routers.trace import TraceOptions, TraceRouter

REGISTRY: dict[str, type[Router]] = {
    "deepseek_v3": DeepSeekV3Router,
    "force_balanced": ForceBalancedRouter,
    "softmax_topk": SoftmaxTopKRouter,
    "trace": TraceRouter,
}

__all__ = [
    "REGISTRY",
    "DeepSeekV3Options",
    "DeepSeekV3Router",
    "ForceBalancedOptions",
    "ForceBalancedRouter",
    "Router",
    "RouterCounts",
    "RouterInputs",
    "RouterOptions",
    "Routing",
    "SoftmaxTopKOptions",
    "SoftmaxTopKRouter",
    "TraceOptions",
    "TraceRouter",
]
