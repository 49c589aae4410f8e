"""Options of the MoE layer (block ``moe`` of a config) and of its router (block ``router``)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moejax import config
from moejax.config import check, check_not_negative, check_positive
from moejax.moe.routers import REGISTRY, DeepSeekV3Options, RouterOptions

Dispatch = Literal["auto", "dense_loop", "capacity", "blocks"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Options of the MoE layer.

    Attributes:
      num_experts: routed experts, E.
      top_k: routed experts that a token runs through, K.
      d_expert: width F of one expert.
      num_shared_experts: experts that every token runs through; they act as one, this many times
        as wide.
      dispatch: how a device computes its tokens. ``dense_loop`` runs every expert over every
        token (the reference), ``capacity`` gives each expert equally many slots a sequence and
        drops what does not fit, ``blocks`` drops nothing. ``auto`` is ``blocks``.
      capacity_factor: slots of an expert over its fair share of a sequence's assignments.
      router: options of the router.
    """

    num_experts: int
    top_k: int
    d_expert: int
    num_shared_experts: int = 0
    dispatch: Dispatch = "auto"
    capacity_factor: float = 1.25
    router: RouterOptions = dataclasses.field(default_factory=DeepSeekV3Options)

    def __post_init__(self) -> None:
        check_positive("moe", self, "num_experts", "top_k", "d_expert", "capacity_factor")
        check_not_negative("moe", self, "num_shared_experts")
        check(
            self.top_k <= self.num_experts, "moe.top_k", self.top_k,
            f"is above moe.num_experts = {self.num_experts}; choose at most that many",
        )  # fmt: skip
        self.router.check(self.num_experts, self.top_k)

    @property
    def chosen_dispatch(self) -> str:
        """The dispatcher that runs: ``auto`` resolved."""
        return "blocks" if self.dispatch == "auto" else self.dispatch


def router_options(values: Mapping[str, Any]) -> RouterOptions:
    """Builds the options of the router that ``values["name"]`` names.

    Raises:
      ConfigError: an unknown router or option, with the nearest known one.
    """
    name = values.get("name", "deepseek_v3")
    known = isinstance(name, str) and name in REGISTRY
    check(known, "router.name", name, f"no such router; {config.nearest(name, REGISTRY)}")
    return config.build(REGISTRY[name].Options, values, "router")
