"""Options of the MoE layer (block ``moe`` of a config) and of its router (block ``router``)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moejax import config
from moejax.config import check, check_not_negative, check_positive
from moejax.moe.dispatch.capacity import LEAKING_POLICIES, DropPolicy
from moejax.moe.experts import Activation
from moejax.moe.routers import DeepSeekV3Options, RouterOptions, find

Dispatch = Literal["auto", "dense_loop", "capacity", "blocks", "rounds", "grouped"]
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
        drops what does not fit, ``blocks`` drops nothing, ``rounds`` drops nothing and is for few
        tokens (decoding takes it by itself in place of ``blocks``), ``grouped`` drops nothing and
        needs a GPU. ``auto`` picks by platform: see ``moejax.moe.choose``.
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
      latent_dim: width that tokens are projected to before the experts and back from after them,
        by two matrices that all experts share, while the router sees the full width (latent MoE,
        arXiv 2601.18089); 0 means none.
      gate_rank: the experts' gate projection is a product of two factors of this rank (autonomy of
        experts, arXiv 2501.13074); 0 means one full matrix.
      activation: of routed experts: ``swiglu``, or ``clamped_swiglu``, gpt-oss's: gate at most 7,
        up from -7 to 7, gate · sigmoid(1.702 · gate) · (up + 1). Shared experts are SwiGLU.
      expert_bias: both products of the routed experts have biases (gpt-oss).
      shared_gate: the shared experts' output is multiplied by a sigmoid of the token (Qwen2-MoE).
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
    latent_dim: int = 0
    gate_rank: int = 0
    activation: Activation = "swiglu"
    expert_bias: bool = False
    shared_gate: bool = False
    router: RouterOptions = dataclasses.field(default_factory=DeepSeekV3Options)

    def __post_init__(self) -> None:
        check_positive(
            "moe", self, "num_experts", "top_k", "d_expert", "capacity_factor", "exchange_factor",
            "devices_per_node",
        )  # fmt: skip
        check_not_negative("moe", self, "num_shared_experts", "latent_dim", "gate_rank")
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
        check(
            self.allow_leak or not self.router.leaks, "router.name", self.router.name,
            "lets a later token change an earlier one's output, so the loss would leak; use a "
            "causal router, or set moe.allow_leak = True",
        )  # fmt: skip
        check(
            not self.shared_gate or self.num_shared_experts > 0, "moe.shared_gate", True,
            "has no shared expert to gate; set moe.num_shared_experts, or leave it False",
        )  # fmt: skip
        check(
            not self.latent_dim or not self.router.needs_full_width, "moe.latent_dim",
            self.latent_dim,
            f"gives experts another space than the one that router {self.router.name} (or its "
            "coupling loss) shows them; set it to 0",
        )  # fmt: skip
        check(
            self.gate_rank > 0 or not self.router.needs_gate_rank, "moe.gate_rank", self.gate_rank,
            f"router {self.router.name} chooses by the experts' low-rank activations; set a rank, "
            "such as a quarter of moe.d_expert",
        )  # fmt: skip
        self.router.check(self.num_experts, self.top_k)


def router_options(values: Mapping[str, Any], *, own: bool = True) -> RouterOptions:
    """Builds the options of the router that ``values["name"]`` names; ``own`` as in ``find``.

    Raises:
      ConfigError: an unknown router or option, with the nearest known one.
    """
    name = values.get("name", DeepSeekV3Options.name)
    router = find(name, own=own)
    known = {field.name for field in dataclasses.fields(router.Options)}
    for field in values:
        check(
            not field.startswith("bias_") or field in known or "bias_rule" in known,
            f"router.{field}", values[field],
            f"router {name} has no selection bias; leave it out, or choose a router with one, "
            "such as deepseek_v3",
        )  # fmt: skip
    return config.build(router.Options, values, "router")
