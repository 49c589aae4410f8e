"""Options of the MoE layer (block ``moe`` of a config) and of its router (block ``router``)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moejax import config
from moejax.config import check, check_not_negative, check_positive
from moejax.moe.dispatch.capacity import LEAKING_POLICIES, DropPolicy
from moejax.moe.routers import REGISTRY, DeepSeekV3Options, RouterOptions

Dispatch = Literal["auto", "dense_loop", "capacity", "blocks", "grouped"]
Exchange = Literal["auto", "none", "all_to_all", "ragged_all_to_all"]
Overflow = Literal["exact", "drop"]


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
        drops what does not fit, ``blocks`` drops nothing, ``grouped`` drops nothing and needs a
        GPU. ``auto`` picks by platform: see ``moejax.moe.choose``.
      capacity_factor: slots of an expert over its fair share of a sequence's assignments.
      drop_policy: who keeps a slot under ``capacity``: see ``moejax.moe.dispatch.capacity.drop``.
      allow_leak: allow what lets a token's output depend on later tokens. A loss measured so is
        no language model's loss, and the run's log warns of it.
      exchange: how tokens reach experts on other devices. ``none`` leaves them where they are and
        gathers the experts' weights instead, ``all_to_all`` sends rounds of equal size,
        ``ragged_all_to_all`` sends filled rows only and needs a GPU or TPU. ``auto`` picks by
        platform and mesh.
      exchange_factor: rows of a round between two devices over the number to be expected there.
      exchange_overflow: what becomes of tokens beyond the first round. ``exact`` runs further
        rounds until all are computed; ``drop`` leaves them out, counted. A drop depends on the
        mesh.
      devices_per_node: neighbours along the mesh's ``expert`` axis that share a machine; for the
        count of machines that a token reaches, nothing else.
      router: options of the router.
    """

    num_experts: int
    top_k: int
    d_expert: int
    num_shared_experts: int = 0
    dispatch: Dispatch = "auto"
    capacity_factor: float = 1.25
    drop_policy: DropPolicy = "position"
    allow_leak: bool = False
    exchange: Exchange = "auto"
    exchange_factor: float = 1.25
    exchange_overflow: Overflow = "exact"
    devices_per_node: int = 8
    router: RouterOptions = dataclasses.field(default_factory=DeepSeekV3Options)

    def __post_init__(self) -> None:
        check_positive(
            "moe", self, "num_experts", "top_k", "d_expert", "capacity_factor", "exchange_factor",
            "devices_per_node",
        )  # fmt: skip
        check_not_negative("moe", self, "num_shared_experts")
        check(
            self.top_k <= self.num_experts, "moe.top_k", self.top_k,
            f"is above moe.num_experts = {self.num_experts}; choose at most that many",
        )  # fmt: skip
        check(
            self.allow_leak or self.drop_policy not in LEAKING_POLICIES,
            "moe.drop_policy", self.drop_policy,
            "lets a later token displace an earlier one, so the loss would leak; use 'position', "
            "or set moe.allow_leak = True",
        )  # fmt: skip
        self.router.check(self.num_experts, self.top_k)


def router_options(values: Mapping[str, Any]) -> RouterOptions:
    """Builds the options of the router that ``values["name"]`` names.

    Raises:
      ConfigError: an unknown router or option, with the nearest known one.
    """
    name = values.get("name", "deepseek_v3")
    known = isinstance(name, str) and name in REGISTRY
    check(known, "router.name", name, f"no such router; {config.nearest(name, REGISTRY)}")
    return config.build(REGISTRY[name].Options, values, "router")
