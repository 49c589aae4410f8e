"""Routers with experts that compute nothing, beside those with matrices.

Choices of E and above are the experts without matrices. They take part in the choice and in the
losses, but no dispatcher sees them: their weighted outputs are the routing's ``bypass``, so that a
token's work is what its experts with matrices cost. A token that chose none of those counts as
``unrouted``.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import check, check_not_negative, check_positive
from moejax.moe import balance, rowwise
from moejax.moe.bias_rules import BiasRuleName
from moejax.moe.routers.base import Card, RouterCounts, RouterInputs, Routing, project
from moejax.moe.routers.losses import LossOptions, ScoredRouter
from moejax.moe.routers.stats import assignment_counts
from moejax.moe.routers.top_k import (
    Score,
    TopKOptions,
    TopKRouter,
    gates,
    normalized,
    score,
    select,
)


@dataclasses.dataclass(frozen=True)
class MoEPlusPlusOptions(LossOptions):
    """Defaults are MoE++'s; ``moe.top_k`` counts all choices.

    Attributes:
      num_zero: experts whose output is 0.
      num_copy: experts whose output is the token.
      num_constant: experts whose output is a learned mixture of the token and a learned vector; -1
        takes a quarter of moe.num_experts with the two kinds above, at least 2, as the paper's
        models have.
      tau: weight in the balance loss of the experts without matrices; the smaller, the more
        tokens they get.
      hetero_loss_weight: that loss, sum_i eta_i f_i P_i over the choices with eta 1 or tau,
        f_i = c_i / T, unlike the balance loss not scaled to 1 at balance.
    """

    carries_logits: ClassVar[bool] = True

    name: str = "moe_plus_plus"
    num_zero: int = 1
    num_copy: int = 1
    num_constant: int = -1
    tau: float = 0.75
    hetero_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("router", self, "num_zero", "num_copy")
        check(self.num_constant >= -1, "router.num_constant", self.num_constant,
              "is no number of experts; choose one from 0 up, or -1 for the paper's")  # fmt: skip
        check_positive("router", self, "tau")

    def constants(self, num_experts: int) -> int:
        """How many constant experts there are."""
        if self.num_constant >= 0:
            return self.num_constant
        return max(num_experts // 4 - self.num_zero - self.num_copy, 2)

    def num_choices(self, num_experts: int) -> int:
        return num_experts + self.num_zero + self.num_copy + self.constants(num_experts)

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        choices, constants = self.num_choices(num_experts), self.constants(num_experts)
        matrices = d_model * choices + choices**2 + 2 * constants * d_model
        vectors = constants * d_model
        # At the balance that the loss asks for (the paper's table 1).
        ffn = self.tau * num_experts
        expected = top_k * ffn / (ffn + choices - num_experts)
        return RouterCounts(
            matrices + vectors, 2.0 * (matrices + vectors), expected, measured=True
        )  # fmt: skip


class MoEPlusPlusRouter(ScoredRouter):
    """Top-k of softmax over E experts, zero, copy and constant ones; gate = p of the chosen.

    Logits are W x + W_g G, with G the logits of the MoE layer before (0 at the first). A zero
    expert gives 0, a copy expert x, a constant expert a_1 x + a_2 v with a = softmax(W_c x), v and
    W_c its own. Order of the choices: experts with matrices, zero, copy, constant. Stateless,
    causal.

    Source: MoE++ (arXiv 2410.07348, eq. 3 to 7; numbers of experts from table 2, tau 0.75, weight
    0.01). Deviations: capacities are the dispatcher's, the same for all experts, and experts
    without matrices have no limit (the paper's eq. 8 gives them one); the released code sets the
    gate of the zero expert to 0, renormalises and scales by K, which the paper does not say.
    """

    Options: ClassVar = MoEPlusPlusOptions
    card: ClassVar = Card(
        "softmax top-k with zero, copy and constant experts, logits of the layer before added",
        "MoE++, 2410.07348", "", "easy tokens at less cost",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: MoEPlusPlusOptions = self.options
        count, x = self.num_experts, inputs.x.reshape(-1, inputs.x.shape[-1])
        logits = self.logits(x)
        choices = logits.shape[-1]
        residual = self.matrix("residual", (choices, choices), (None, "router_expert"))
        if inputs.previous_logits is not None:
            logits = logits + project(inputs.previous_logits.reshape(-1, choices), residual)
        p = jax.nn.softmax(logits, axis=-1)
        gate, expert = rowwise.top_k(p, self.top_k)
        kept = jnp.where(inputs.valid.reshape(-1, 1), gate, 0.0)
        first_copy, first_constant = count + o.num_zero, count + o.num_zero + o.num_copy
        share = jnp.sum(gates_of(expert, kept, first_copy, first_constant), axis=-1, keepdims=True)
        mixed = self._constants(x, gates_of(expert, kept, first_constant, choices))
        bypass = share * x.astype(jnp.float32) + mixed
        load = assignment_counts(self._masked(expert, inputs.valid.reshape(-1), choices), choices)
        return self.decide(
            inputs, logits, p, expert, gate, self._own_losses(inputs, p, load),
            bypass=bypass.reshape(inputs.x.shape), stats={"choice_load": load},
            loss_expert=expert, loss_gate=gate,
        )  # fmt: skip

    def _constants(self, x: Float[Array, "T D"], gate: Float[Array, "T C"]) -> Float[Array, "T D"]:
        """The constant experts' summed outputs."""
        count, width = gate.shape[-1], x.shape[-1]
        if not count:
            return jnp.zeros(x.shape, jnp.float32)
        kernel = self.matrix("constant_kernel", (width, 2 * count), ("embed", None))
        start = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "embed"))
        vector = self.param("constant", start, (count, width), jnp.float32)
        mix = jax.nn.softmax(project(x, kernel).reshape(-1, count, 2), axis=-1)
        share = jnp.sum(gate * mix[..., 0], axis=-1, keepdims=True)
        return share * x.astype(jnp.float32) + project(gate * mix[..., 1], vector)

    def _own_losses(
        self, inputs: RouterInputs, p: Float[Array, "T N"], load: Float[Array, " N"]
    ) -> dict[str, tuple[float, Array]]:
        o: MoEPlusPlusOptions = self.options
        if not o.hetero_loss_weight:
            return {}
        valid = inputs.valid.reshape(-1)
        weight = jnp.where(jnp.arange(len(load)) < self.num_experts, 1.0, o.tau)
        share = load / jnp.maximum(jnp.sum(valid), 1)
        value = jnp.sum(weight * share * balance.mean_probabilities(p, valid))
        return {"hetero": (o.hetero_loss_weight, value)}


def gates_of(
    expert: Int[Array, "T K"], gate: Float[Array, "T K"], first: int, end: int
) -> Float[Array, "T C"]:
    """The gate of each choice from ``first`` to before ``end``; 0 where it was not chosen."""
    hit = expert[:, :, None] == jnp.arange(first, end)[None, None, :]
    return jnp.sum(jnp.where(hit, gate[:, :, None], 0.0), axis=1)


@dataclasses.dataclass(frozen=True)
class LongCatOptions(TopKOptions):
    """Defaults are LongCat-Flash's form; ``moe.top_k`` counts all choices (512 + 256, K 12).

    Attributes:
      num_zero_experts: identity experts; 0 means half of moe.num_experts, as the model has.
      mean_experts: experts with matrices that a token is to run through on average; 0 means their
        share of the choices, which is the model's 8 of 12.
    """

    name: str = "longcat"
    score: Score = "softmax"
    routed_scale: float = 6.0
    bias_rule: BiasRuleName = "longcat"
    num_zero_experts: int = 0
    mean_experts: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("router", self, "num_zero_experts", "mean_experts")
        check(
            self.num_groups == 1, "router.num_groups", self.num_groups,
            "would split the identity experts among groups; set it to 1",
        )  # fmt: skip

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            num_experts > 1 or self.num_zero_experts > 0, "router.num_zero_experts", 0,
            "leaves no identity expert beside moe.num_experts = 1; set at least one",
        )  # fmt: skip
        super().check(num_experts, top_k)
        check(
            self.mean_experts <= top_k, "router.mean_experts", self.mean_experts,
            f"is above moe.top_k = {top_k}, which counts all choices; choose less",
        )  # fmt: skip

    def num_choices(self, num_experts: int) -> int:
        return num_experts + (self.num_zero_experts or num_experts // 2)

    def wanted_experts(self, num_experts: int, top_k: int) -> float:
        """The mean number of experts with matrices that the bias steers to."""
        return self.mean_experts or top_k * num_experts / self.num_choices(num_experts)

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        counted = super().counts(d_model, num_experts, top_k)
        expected = self.wanted_experts(num_experts, top_k)
        return dataclasses.replace(counted, expected_experts=expected, measured=True)


class LongCatRouter(TopKRouter):
    """Top-k of softmax + b over E experts and Z identity ones; gate = scale · p of the chosen.

    An identity expert gives the token itself. After each optimizer step the b of expert i with
    matrices moves by step · (K_e / (K E) - share_i), share_i its part of all assignments, so that a
    token runs through K_e of them on average; the identity experts' b stays 0, and they get what is
    left. Scores and shares shrink alike with more choices, so a step holds for any E.
    Causal: b knows earlier batches only.

    Source: LongCat-Flash (arXiv 2509.01322, eq. 3) and its code in Transformers, with which choice,
    gates and output agree. The size of the step was not found published; the device-level balance
    loss of the paper, weighed by groups with the identity experts as one, is left out.
    """

    Options: ClassVar = LongCatOptions
    card: ClassVar = Card(
        "softmax plus selection bias over experts and identities", "LongCat-Flash, 2509.01322",
        "selection bias", "a budget of experts that tokens share out among themselves",
    )  # fmt: skip
    replays: ClassVar[bool] = False  # which of the experts without matrices is not kept

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: LongCatOptions = self.options
        logits = self.scored_logits(inputs)
        choices, valid = logits.shape[-1], inputs.valid.reshape(-1)
        scores = score(o.score, logits)
        bias = self.bias(choices)
        expert = select(scores, bias, self.top_k)
        gate = gates(scores, expert, o.normalize_gates, o.routed_scale)
        probabilities = normalized(o.score, scores)
        identity = jnp.where((expert >= self.num_experts) & valid[:, None], gate, 0.0)
        share = jnp.sum(identity, axis=-1).reshape(*inputs.valid.shape, 1)
        load = assignment_counts(self._masked(expert, valid, choices), choices)
        return self.decide(
            inputs, logits, probabilities, expert, gate,
            self.group_losses(inputs, expert, probabilities),
            bypass=share * inputs.x.astype(jnp.float32),
            stats={"choice_load": load, **self.bias_stats(inputs, scores, bias)},
            loss_expert=expert, loss_gate=gate,
        )  # fmt: skip

    def update(self, state: Mapping[str, Array], stats: Mapping[str, Array]) -> dict[str, Array]:
        o: LongCatOptions = self.options
        choices = o.num_choices(self.num_experts)
        share = o.wanted_experts(self.num_experts, self.top_k) / (self.top_k * self.num_experts)
        target = jnp.where(jnp.arange(choices) < self.num_experts, share, -1.0)
        return o.rule.update(
            dict(state), stats["choice_load"], stats.get("score_histogram"), self.top_k / choices,
            target,
        )  # fmt: skip
