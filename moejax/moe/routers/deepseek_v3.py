"""DeepSeek-V3's router: sigmoid scores, a selection bias, groups, renormalised and scaled gates."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import check, check_not_negative, check_positive
from moejax.moe import balance
from moejax.moe.routers.base import Router, RouterInputs, RouterOptions, Routing


@dataclasses.dataclass(frozen=True)
class DeepSeekV3Options(RouterOptions):
    """Options of the DeepSeek-V3 router; defaults are V3's, but for the groups (V3: 8, 4 kept).

    Attributes:
      num_groups: groups of neighbouring experts.
      groups_kept: groups that a token may choose its experts from.
      normalize_gates: divide the chosen scores by their sum.
      routed_scale: factor on the gates.
      bias_step: size of the selection bias's step; 0 freezes it. 0.001 needs 300 to 1,000 steps
        to balance; shorter runs want more.
      sequence_loss_weight: weight of the sequence-wise balance loss.
    """

    name: str = "deepseek_v3"
    num_groups: int = 1
    groups_kept: int = 1
    normalize_gates: bool = True
    routed_scale: float = 2.5
    bias_step: float = 1e-3
    sequence_loss_weight: float = 1e-4

    def __post_init__(self) -> None:
        check_positive("router", self, "num_groups", "groups_kept", "routed_scale")
        check_not_negative("router", self, "bias_step", "sequence_loss_weight")
        check(
            self.groups_kept <= self.num_groups, "router.groups_kept", self.groups_kept,
            f"is above router.num_groups = {self.num_groups}; keep at most that many",
        )  # fmt: skip

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            not (self.normalize_gates and top_k == 1), "router.normalize_gates", True,
            "with moe.top_k = 1 makes every gate the same, so the router learns nothing from the "
            "loss; set it to False or raise moe.top_k",
        )  # fmt: skip
        check(
            num_experts % self.num_groups == 0, "router.num_groups", self.num_groups,
            f"does not divide moe.num_experts = {num_experts}; choose a divisor",
        )  # fmt: skip
        check(
            self.num_groups == 1 or num_experts // self.num_groups >= 2,
            "router.num_groups", self.num_groups,
            "leaves one expert a group, but a group is scored by its two best; use fewer groups",
        )  # fmt: skip
        reachable = self.groups_kept * num_experts // self.num_groups
        check(
            top_k <= reachable, "router.groups_kept", self.groups_kept,
            f"leaves {reachable} experts, fewer than moe.top_k = {top_k}; keep more groups",
        )  # fmt: skip


class DeepSeekV3Router(Router):
    """Top-k of s + b inside the best groups, where s = sigmoid(W x); gate = scale · s / sum s.

    The bias b only selects: gates do not depend on it and it gets no gradient. After each step it
    moves against the load (``balance.sign_bias_update``). Causal: b knows earlier batches only.

    Source: DeepSeek-V3 (arXiv 2412.19437, eq. 13 to 20, and section 4.2 for the values); the
    group score, the sum of a group's two best, is from its released code.
    """

    Options: ClassVar[type[RouterOptions]] = DeepSeekV3Options

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        batch, length, width = inputs.x.shape
        logits = self.logits(inputs.x.reshape(-1, width))
        scores = jax.nn.sigmoid(logits)
        # router_state is a collection of its own: read here, written by the training step only.
        bias = self.variable("router_state", "bias", jnp.zeros, (self.num_experts,), jnp.float32)
        options: DeepSeekV3Options = self.options
        expert = select(scores, bias.value, self.top_k, options.num_groups, options.groups_kept)
        gate = jnp.take_along_axis(scores, expert, axis=-1)
        if options.normalize_gates:
            gate = gate / (jnp.sum(gate, axis=-1, keepdims=True) + 1e-20)
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        rows = lambda values: values.reshape(batch, length, -1)
        loss = balance.sequence_balance_loss(rows(expert), rows(probabilities), inputs.valid)
        return self.finish(
            inputs, logits, probabilities, expert, gate * options.routed_scale,
            options.sequence_loss_weight * loss,
        )  # fmt: skip

    def update(self, state: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
        bias = balance.sign_bias_update(state["bias"], stats["load"], self.options.bias_step)
        return {**state, "bias": bias}


def select(
    scores: Float[Array, "T E"],
    bias: Float[Array, " E"],
    top_k: int,
    num_groups: int = 1,
    groups_kept: int = 1,
) -> Int[Array, "T K"]:
    """Indices of the top-k of scores + bias inside each token's best groups.

    A group's score is the sum of the two best biased scores in it. With all groups kept this is
    plain top-k. Ties go to the lower index. Not differentiable.
    """
    biased = jax.lax.stop_gradient(scores + bias[None, :])
    if groups_kept < num_groups:
        grouped = biased.reshape(len(biased), num_groups, -1)
        group_score = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        best = jax.lax.top_k(group_score, groups_kept)[1]
        kept = jnp.any(jax.nn.one_hot(best, num_groups, dtype=bool), axis=1)
        biased = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(biased.shape)
    return jax.lax.top_k(biased, top_k)[1]
