"""Experts that choose tokens: the best of a batch, or all those above a remembered threshold."""

import dataclasses
import math
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import check, check_not_negative, check_positive
from moejax.moe import rowwise
from moejax.moe.quantiles import histogram, quantile_of_histogram
from moejax.moe.routers.base import Card, Router, RouterCounts, RouterInputs, RouterOptions, Routing
from moejax.moe.routers.rows import GatheredRows

Group = Literal["sequence", "batch"]


@dataclasses.dataclass(frozen=True)
class ExpertChoiceOptions(RouterOptions):
    """Defaults are the paper's: as much work as top-k, no loss.

    Attributes:
      group: whose tokens compete: each row's of the batch by themselves, or the whole batch's,
        whose chosen tokens are then gathered on every device; each computes its own experts.
      capacity: experts that a token gets on average, over ``moe.top_k``.
    """

    leaks: ClassVar[bool] = True

    name: str = "expert_choice"
    group: Group = "sequence"
    capacity: float = 1.0

    def __post_init__(self) -> None:
        check_positive("router", self, "capacity")

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        counted = super().counts(d_model, num_experts, top_k)
        expected = min(self.capacity * top_k, float(num_experts))
        return dataclasses.replace(counted, expected_experts=expected, measured=True)

    def slots(self, tokens: int, num_experts: int, top_k: int) -> int:
        """Tokens that an expert takes of a group: ceil(tokens · K / E · capacity), at most all."""
        return min(tokens, math.ceil(tokens * top_k / num_experts * self.capacity))


class ExpertChoiceRouter(Router):
    """Every expert takes its best tokens of a group; gate = p of softmax(W x) over the experts.

    Loads are exactly equal without a loss; a token gets any number of experts, none included. An
    expert takes ceil(tokens · K / E · capacity) tokens, where padding counts in the number but is
    never taken: with fewer real tokens than that, places stay empty.

    Leaks: tokens compete, so a later one can displace an earlier one. Evaluation (``train`` False)
    therefore is causal token choice, the K best of the same scores for every token, which the
    paper does not have.

    Source: Expert Choice (arXiv 2202.09368, section 3.2, eq. 1 and 2), over all the batch's tokens.
    """

    Options: ClassVar[type[RouterOptions]] = ExpertChoiceOptions
    card: ClassVar[Card] = Card(
        "each expert takes its best tokens; top-k of the same scores in evaluation",
        "Expert Choice, 2202.09368", "", "encoders: exact balance; leaks in a causal model",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        probabilities = jax.nn.softmax(logits, axis=-1)
        if not inputs.train:
            gate, expert = rowwise.top_k(probabilities, self.top_k)
            return self.finish(inputs, logits, probabilities, expert, gate)
        groups = len(inputs.valid) if self.options.group == "sequence" else 1
        slots = self.options.slots(len(logits) // groups, self.num_experts, self.top_k)
        scores = probabilities.reshape(groups, -1, self.num_experts)
        token, expert, gate = take_tokens(scores, inputs.valid.reshape(groups, -1), slots)
        rows = GatheredRows(token.reshape(groups, -1))
        expert, gate = expert.reshape(-1, 1), gate.reshape(-1, 1)
        return self.finish(inputs, logits, probabilities, expert, gate, rows=rows)


def take_tokens(
    scores: Float[Array, "G N E"], valid: Bool[Array, "G N"], slots: int
) -> tuple[Int[Array, "G E C"], Int[Array, "G E C"], Float[Array, "G E C"]]:
    """The ``slots`` best valid tokens of every expert in every group.

    Args:
      scores: not negative.
      valid: False for padding.
      slots: C.

    Returns:
      The token of each slot, its expert, E where too few tokens are valid, and its score.
    """
    experts = scores.shape[-1]
    open_ = jnp.where(valid[..., None], scores, -1.0)
    score, token = jax.lax.top_k(jnp.swapaxes(open_, 1, 2), slots)
    filled = score >= 0
    expert = jnp.where(filled, jnp.arange(experts, dtype=jnp.int32)[None, :, None], experts)
    return token, expert, jnp.where(filled, score, 0.0)


@dataclasses.dataclass(frozen=True)
class ExpertThresholdOptions(RouterOptions):
    """Defaults are those of the paper's released code, but for its warm-up.

    Attributes:
      decay: share of the past in the thresholds' average.
      max_experts: the most experts that one token may get, its best ones; 0 means all of them. A
        low bound makes a step cheaper with many experts.
    """

    name: str = "expert_threshold"
    decay: float = 0.99
    max_experts: int = 0

    def __post_init__(self) -> None:
        check(
            0 <= self.decay < 1, "router.decay", self.decay,
            "is no share of the past; choose one from 0 to below 1",
        )  # fmt: skip
        check_not_negative("router", self, "max_experts")

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            not self.max_experts or top_k <= self.max_experts <= num_experts,
            "router.max_experts", self.max_experts,
            f"is not between moe.top_k = {top_k} and moe.num_experts = {num_experts}; choose one "
            "that is, or 0",
        )  # fmt: skip

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        return dataclasses.replace(super().counts(d_model, num_experts, top_k), measured=True)


class ExpertThresholdRouter(Router):
    """An expert takes every token whose score sigmoid(W x) is above its threshold; gate = score.

    After a step the threshold moves towards the (K T / E)-th largest of the expert's scores in the
    step's whole batch: an average with a start-up correction, so that the first update sets it.
    Expert choice over all batches so far: a token gets any number of experts, none included, K on
    average. Causal, in training as in evaluation: thresholds know earlier batches only.

    Before the first update there is no threshold, and every token takes its K best experts. The
    paper trains its first 4,000 steps by expert choice instead, which leaks.

    The batch's quantile is read from a histogram that adds up over devices and micro-batches
    (``moejax.moe.quantiles``), where the released code averages the micro-batches' own. It
    averages logits, this router scores.

    Source: Expert Threshold Routing (arXiv 2603.11535) and its released code.
    """

    Options: ClassVar[type[RouterOptions]] = ExpertThresholdOptions
    card: ClassVar[Card] = Card(
        "each expert takes the tokens above its threshold, K a token on average",
        "Expert Threshold, 2603.11535", "thresholds", "causal expert choice; add a shared expert",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        scores = jax.nn.sigmoid(logits)
        nothing = lambda: jnp.zeros(self.num_experts, jnp.float32)
        threshold = self.variable("router_state", "threshold", nothing).value
        updates = self.variable("router_state", "updates", lambda: jnp.zeros((), jnp.int32)).value
        above = jnp.where(updates > 0, scores > threshold[None, :], self._best(scores))
        expert = jnp.where(above, jnp.arange(self.num_experts)[None, :], self.num_experts)
        gate = scores
        if self.options.max_experts:
            order = jnp.where(above, scores, -1.0)
            chosen = rowwise.top_k(jax.lax.stop_gradient(order), self.options.max_experts)[1]
            expert, gate = (jnp.take_along_axis(of, chosen, axis=-1) for of in (expert, gate))
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        counts = {"score_histogram": histogram(scores, inputs.valid.reshape(-1))}
        return self.finish(inputs, logits, probabilities, expert, gate, stats=counts)

    def _best(self, scores: Float[Array, "T E"]) -> Bool[Array, "T E"]:
        """Which are a token's K best."""
        chosen = rowwise.top_k(jax.lax.stop_gradient(scores), self.top_k)[1]
        token = jnp.arange(len(scores))[:, None]
        return jnp.zeros(scores.shape, bool).at[token, chosen].set(True)

    def update(self, state: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
        """Thresholds moved towards the batch's quantiles; a step without a token moves nothing."""
        decay, updates = self.options.decay, state["updates"] + 1
        found = quantile_of_histogram(stats["score_histogram"], self.top_k / self.num_experts)
        # An average from zero, over the sum of its weights, is the same as these steps.
        step = (1 - decay) / (1 - decay ** updates.astype(jnp.float32))
        moved = state["threshold"] + step[..., None] * (found - state["threshold"])
        seen = stats["tokens"] > 0
        return {
            "threshold": jnp.where(seen[..., None], moved, state["threshold"]),
            "updates": jnp.where(seen, updates, state["updates"]),
        }
