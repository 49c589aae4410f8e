"""Routers that give a token as many experts as its scores ask for."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config import check, check_not_negative
from moejax.moe import rowwise
from moejax.moe.routers.base import Card, RouterCounts, RouterInputs, Routing, project
from moejax.moe.routers.losses import LossOptions, ScoredRouter


@dataclasses.dataclass(frozen=True)
class TopPOptions(LossOptions):
    """Defaults: 0.4 and 1e-4. ``moe.top_k`` is what the bill expects a token to run through.

    Attributes:
      top_p: the summed probability that a token's experts have to exceed.
      max_experts: experts of a token at most; 0 means all. Fewer make a shorter list of
        assignments, so less memory.
      entropy_loss_weight: entropy of a token's probabilities, which keeps the experts few.
    """

    name: str = "top_p"
    top_p: float = 0.4
    max_experts: int = 0
    entropy_loss_weight: float = 1e-4
    balance_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("router", self, "max_experts")
        check(
            0 <= self.top_p <= 1, "router.top_p", self.top_p,
            "is no probability; choose one from 0, which keeps one expert, to 1",
        )  # fmt: skip

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            self.max_experts <= num_experts, "router.max_experts", self.max_experts,
            f"is above moe.num_experts = {num_experts}; choose at most that many, or 0",
        )  # fmt: skip

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        counted = super().counts(d_model, num_experts, top_k)
        expected = min(top_k, self.max_experts or num_experts)
        return dataclasses.replace(counted, expected_experts=float(expected), measured=True)


class TopPRouter(ScoredRouter):
    """The fewest experts whose p = softmax(W x) sum to more than ``top_p``; gate = p. Stateless.

    The best expert always runs; a confident token stops there. Losses: the balance loss, and the
    entropy of p, without which p flattens and more and more experts run. Causal.

    Source: Harder tasks need more experts (arXiv 2403.07652); choice and gates are as in its
    released code, which has no losses. The weight of the balance loss is the usual one.
    """

    Options: ClassVar = TopPOptions
    card: ClassVar = Card(
        "the fewest experts with summed probability above 0.4", "top-p routing, 2403.07652", "",
        "more experts for tokens that the router is unsure of",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: TopPOptions = self.options
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        p = jax.nn.softmax(logits, axis=-1)
        gate, expert = p, jnp.arange(self.num_experts, dtype=jnp.int32)[None, :]
        if o.max_experts:
            gate, expert = rowwise.top_k(p, o.max_experts)
        kept = fewest(jax.lax.stop_gradient(gate), o.top_p)
        expert = jnp.where(kept, expert, self.num_experts)
        losses = {}
        if o.entropy_loss_weight:
            entropy = -jnp.sum(p * jax.nn.log_softmax(logits, axis=-1), axis=-1)
            losses["entropy"] = (o.entropy_loss_weight, mean_of_tokens(entropy, inputs))
        return self.decide(inputs, logits, p, expert, gate, losses)


def fewest(p: Float[Array, "T N"], total: float) -> Bool[Array, "T N"]:
    """The fewest of each row that sum to more than ``total``, the largest first; at least one.

    One is among them where the larger ones, and equal ones before it, sum to ``total`` at most.
    Without sorting: the bits of numbers from 0 up have the numbers' order, so that halving an
    interval of integers 31 times finds the least that is kept.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)
    above = lambda least: jnp.sum(jnp.where(bits > least, p, 0.0), axis=-1, keepdims=True)

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        enough = above(middle) <= total
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    high = jnp.max(bits, axis=-1, keepdims=True)
    least = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))[1]
    equal = bits == least
    earlier = jnp.cumsum(equal, axis=-1) - equal
    return (bits > least) | (equal & (above(least) + earlier * p <= total))


@dataclasses.dataclass(frozen=True)
class DynMoEOptions(LossOptions):
    """Defaults are the code's. ``moe.top_k`` is what the bill expects a token to run through.

    Attributes:
      diversity_loss_weight: the norm of the columns' cosines less 1, plus the columns' mean norm.
      efficiency_loss_weight: the mean share of the experts that run; the released code adds it
        for language and leaves it out for vision.
    """

    name: str = "dynmoe"
    diversity_loss_weight: float = 0.01
    efficiency_loss_weight: float = 0.0

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        counted = super().counts(d_model, num_experts, top_k)
        return dataclasses.replace(counted, params=counted.params + num_experts, measured=True)


class DynMoERouter(ScoredRouter):
    """Every expert whose cosine with the token exceeds the expert's own learned threshold.

    s = cos(x, w_i); expert i runs where sigmoid(s_i) > sigmoid(G_i). The K' experts that run have
    gate 1 / K', with the gradient of (sigmoid(s_i) - sigmoid(G_i)) / K' passed straight through to
    router and thresholds. Where none exceeds its threshold the one with the best cosine runs. The
    columns start orthogonal, the thresholds at 0. Stateless, causal.

    Source: DynMoE (arXiv 2405.14297) by its released code: choice, gates, start, and the loss
    |cos(W'W) - 1|_F + the columns' mean norm at 0.01. Deviations: experts are neither
    added nor removed during training; and the fall-back to the best expert holds in training too,
    where the code lets such tokens pass, to see that an expert is wanting.
    """

    Options: ClassVar = DynMoEOptions
    card: ClassVar = Card(
        "every expert whose cosine exceeds its learned threshold, gates equal",
        "DynMoE, 2405.14297", "", "learning how many experts each token gets",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: DynMoEOptions = self.options
        shape = (inputs.x.shape[-1], self.num_experts)
        start = nn.with_logical_partitioning(
            nn.initializers.orthogonal(), ("embed", "router_expert")
        )
        kernel = self.param("kernel", start, shape, jnp.float32)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("router_expert",))
        threshold = self.param("threshold", zeros, shape[1:], jnp.float32)
        x = inputs.x.reshape(-1, shape[0]).astype(jnp.float32)
        cosine = project(unit(x, axis=-1), unit(kernel, axis=0))
        scores = jax.nn.sigmoid(cosine)
        margin = scores - jax.nn.sigmoid(threshold)[None, :]
        each = jnp.arange(self.num_experts, dtype=jnp.int32)[None, :]
        best = each == jnp.argmax(cosine, axis=-1)[:, None]
        over = margin > 0
        on = jnp.where(jnp.any(over, axis=-1, keepdims=True), over, best)
        switch = on * (1 + margin - jax.lax.stop_gradient(margin))
        gate = switch / jnp.sum(on, axis=-1, keepdims=True)
        losses = {}
        if o.diversity_loss_weight:
            losses["diversity"] = (o.diversity_loss_weight, diversity_loss(kernel))
        if o.efficiency_loss_weight:
            running = mean_of_tokens(jnp.mean(switch, axis=-1), inputs)
            losses["efficiency"] = (o.efficiency_loss_weight, running)
        expert = jnp.where(on, each, self.num_experts)
        probabilities = scores / jnp.sum(scores, axis=-1, keepdims=True)
        return self.decide(inputs, cosine, probabilities, expert, gate, losses)


def diversity_loss(kernel: Float[Array, "D E"]) -> Float[Array, ""]:
    """|cos(W'W) - 1|_F + the columns' mean norm (DynMoE's diversity and simplicity losses)."""
    columns = unit(kernel, axis=0)
    excess = columns.T @ columns - jnp.eye(kernel.shape[1])
    norms = jnp.sqrt(jnp.sum(kernel**2, axis=0) + 1e-20)
    return jnp.sqrt(jnp.sum(excess**2) + 1e-20) + jnp.mean(norms)


def unit(values: Float[Array, "N M"], axis: int) -> Float[Array, "N M"]:
    """Vectors of length 1; zero stays zero, with a gradient that is finite."""
    squares = jnp.sum(values**2, axis=axis, keepdims=True)
    return values * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def mean_of_tokens(values: Float[Array, " T"], inputs: RouterInputs) -> Float[Array, ""]:
    """Mean over the tokens that are not padding."""
    valid = inputs.valid.reshape(-1)
    return jnp.sum(values * valid) / jnp.maximum(jnp.sum(valid), 1)
