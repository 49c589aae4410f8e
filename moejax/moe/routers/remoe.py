"""ReMoE: gates are ReLUs, so that how many experts run is learned and the gates are continuous."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.config import check, check_positive
from moejax.moe import balance
from moejax.moe.routers.base import Card, RouterInputs, Routing
from moejax.moe.routers.losses import LossOptions, ScoredRouter

# The weight of the loss stays between these: beyond the lower one float32 would end at 0 for good.
SMALLEST, LARGEST = 1e-20, 1e20


@dataclasses.dataclass(frozen=True)
class ReMoEOptions(LossOptions):
    """Defaults are ReMoE's. ``moe.top_k`` is the mean number of experts that is steered to.

    Attributes:
      start_weight: weight of the sparsity loss before the first step.
      weight_factor: factor that the weight is multiplied or divided by each optimizer step.
    """

    name: str = "remoe"
    start_weight: float = 1e-8
    weight_factor: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("router", self, "start_weight")
        check(
            self.weight_factor > 1, "router.weight_factor", self.weight_factor,
            "does not move the weight; choose a factor above 1",
        )  # fmt: skip

    def counts(self, d_model: int, num_experts: int, top_k: int):
        counted = super().counts(d_model, num_experts, top_k)
        return dataclasses.replace(counted, measured=True)


class ReMoERouter(ScoredRouter):
    """Every expert with g = ReLU(W x) above 0 runs, with gate g; an L1 term keeps them few.

    The term is lambda · E · sum_i f_i G_i, with f_i = c_i / (K T) and G_i the mean of g_i: an L1
    norm that weighs crowded experts more. After each optimizer step lambda is multiplied by
    1.2^sign(target - sparsity), with sparsity the share of (token, expert) pairs that are off and
    target 1 - K / E. A token may run through no expert at all. Training starts with about half of
    the experts on, so the first steps cost more, until lambda has grown. Causal: lambda knows
    earlier batches only.

    Source: ReMoE (arXiv 2412.14711) by its released code. Deviations: lambda is each layer's
    own, by that layer's sparsity, where the code has one for all layers by their mean; and it is
    kept between 1e-20 and 1e20. The reported loss includes lambda.
    """

    Options: ClassVar = ReMoEOptions
    card: ClassVar = Card(
        "every expert with ReLU(W x) above 0; gates are the ReLUs", "ReMoE, 2412.14711",
        "weight of the L1 loss", "gates without jumps, as many experts as a token needs",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        start = self.options.start_weight
        weight = self.variable("router_state", "weight", lambda: jnp.asarray(start, jnp.float32))
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        gate = jax.nn.relu(logits)
        each = jnp.arange(self.num_experts, dtype=jnp.int32)[None, :]
        expert = jnp.where(gate > 0, each, self.num_experts)
        value = self._sparsity_loss(inputs, gate)
        probabilities = gate / (jnp.sum(gate, axis=-1, keepdims=True) + 1e-20)
        losses = {"sparsity": (1.0, jax.lax.stop_gradient(weight.value) * value)}
        return self.decide(inputs, logits, probabilities, expert, gate, losses)

    def _sparsity_loss(self, inputs: RouterInputs, gate: Array) -> Array:
        """E · sum_i f_i G_i over the valid tokens."""
        valid = inputs.valid.reshape(-1)
        on = jnp.sum((gate > 0) & valid[:, None], axis=0, dtype=jnp.float32)
        share = on / (self.top_k * jnp.maximum(jnp.sum(valid), 1))
        return balance.switch_balance_loss(share, balance.mean_probabilities(gate, valid))

    def update(self, state: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
        pairs = stats["tokens"] * self.num_experts
        sparsity = 1 - stats["assignments"] / jnp.maximum(pairs, 1)
        sign = jnp.where(pairs > 0, jnp.sign(1 - self.top_k / self.num_experts - sparsity), 0)
        moved = state["weight"] * self.options.weight_factor**sign
        return {**state, "weight": jnp.clip(moved, SMALLEST, LARGEST)}
