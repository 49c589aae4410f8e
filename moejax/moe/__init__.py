"""Mixture-of-Experts: a router decides, a dispatcher moves, an expert computes."""

from moejax.moe.moe_config import MoEConfig, router_options

__all__ = ["MoEConfig", "router_options"]
