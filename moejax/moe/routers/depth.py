"""Mixture of depths: only some tokens of a sequence run through experts at all."""

import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import check, check_not_negative
from moejax.moe import rowwise
from moejax.moe.routers.base import (
    Card,
    RouterCounts,
    RouterInputs,
    RouterOptions,
    Routing,
    project,
)
from moejax.moe.routers.losses import LossOptions, ScoredRouter
from moejax.moe.routers.rows import GatheredRows


@dataclasses.dataclass(frozen=True)
class MixtureOfDepthsOptions(LossOptions):
    """Defaults: the paper's capacity, Switch's balance loss among the experts.

    Attributes:
      capacity: share of a sequence's positions that the experts compute.
      predictor_width: hidden width of the predictor; 0 means half the model's.
      predictor_loss_weight: of its cross-entropy. No other parameter sees this loss; the paper
        gives no weight.
    """

    leaks: ClassVar[bool] = True

    name: str = "mixture_of_depths"
    capacity: float = 0.125
    predictor_width: int = 0
    predictor_loss_weight: float = 0.01
    balance_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 < self.capacity <= 1, "router.capacity", self.capacity,
            "is no share of a sequence; choose one above 0 and up to 1",
        )  # fmt: skip
        check_not_negative("router", self, "predictor_width")

    def width(self, d_model: int) -> int:
        """Hidden width of the predictor."""
        return self.predictor_width or max(1, d_model // 2)

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        width = self.width(d_model)
        matrices = d_model * (num_experts + 1 + width) + width
        return RouterCounts(
            matrices + width + 1, 2.0 * matrices, self.capacity * top_k, measured=True
        )


class MixtureOfDepthsRouter(ScoredRouter):
    """A sequence's tokens with the largest weight r = w · x go to experts; others get y = 0.

    The chosen tokens, ceil(``capacity`` · S) of each row, are routed by softmax and top-k; gate =
    r · p. With one expert this is mixture of depths on the feed-forward half of a block. The layer
    adds nothing to the others, so they pass on the residual as they are. Padding is never chosen;
    rows with fewer real tokens than places leave some empty.

    As in the paper, r stands in the gates as it is, so that gates can be below zero.

    Leaks in training: tokens compete. In evaluation a small predictor decides for each token by
    itself, which is causal: two matrices with SiLU between, trained by binary cross-entropy on
    whether a token was chosen, with no gradient into x. It takes a token at probability above 1/2,
    so that any number of a sequence's may pass.

    Deviations: attention is not skipped, only the experts; choosing tokens, then experts for them,
    is the paper's staged form inside one layer, where its integrated form has an expert that does
    nothing. The statistic ``predicted`` counts the tokens for which the predictor is right.

    Source: Mixture-of-Depths (arXiv 2404.02258, sections 3.4 and 3.5, eq. 1; 4.3 for experts).
    """

    Options: ClassVar[type[RouterOptions]] = MixtureOfDepthsOptions
    card: ClassVar[Card] = Card(
        "top 12.5 % of a sequence's tokens, then softmax top-k; a predictor in evaluation",
        "Mixture-of-Depths, 2404.02258", "", "fewer FLOPs a token; leaks in training",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: MixtureOfDepthsOptions = self.options
        shape, x = inputs.valid.shape, inputs.x
        logits = self.logits(x.reshape(-1, x.shape[-1]))
        probabilities = jax.nn.softmax(logits, axis=-1)
        score, expert = rowwise.top_k(probabilities, self.top_k)
        weight = project(x, self.matrix("depth", (x.shape[-1], 1), ("embed", None)))[..., 0]
        slots = min(shape[1], math.ceil(o.capacity * shape[1]))
        token, taken, chosen = best_tokens(jax.lax.stop_gradient(weight), inputs.valid, slots)
        guess = self.predictor(x)
        right = jnp.where(inputs.valid, (guess > 0) == chosen, False)
        losses = self.losses(
            inputs.replace(valid=chosen), logits, probabilities, expert, score
        )  # fmt: skip
        losses["predictor"] = (o.predictor_loss_weight, cross_entropy(guess, chosen, inputs.valid))
        gate = score * weight.reshape(-1, 1)
        if inputs.train:
            rows, pick = GatheredRows(token), token + shape[1] * jnp.arange(shape[0])[:, None]
            expert, gate = expert[pick.reshape(-1)], gate[pick.reshape(-1)]
            passes = taken.reshape(-1, 1)
        else:
            rows, passes = None, (guess > 0).reshape(-1, 1)
        return self.finish(
            inputs, logits, probabilities, jnp.where(passes, expert, self.num_experts), gate,
            losses, rows=rows, stats={"predicted": jnp.sum(right, dtype=jnp.float32)},
            layer_weights=o.layer_weights,
        )  # fmt: skip

    def predictor(self, x: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        """The logit of a token's being chosen; no gradient into x."""
        width = self.options.width(x.shape[-1])
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
        first = self.matrix("predictor_in", (x.shape[-1], width), ("embed", None))
        second = self.matrix("predictor_out", (width, 1), (None, None))
        inner = self.param("predictor_in_bias", zeros, (width,), jnp.float32)
        outer = self.param("predictor_out_bias", zeros, (1,), jnp.float32)
        hidden = jax.nn.silu(project(jax.lax.stop_gradient(x), first) + inner[None, None, :])
        return (project(hidden, second) + outer[None, None, :])[..., 0]


def best_tokens(
    weight: Float[Array, "B S"], valid: Bool[Array, "B S"], slots: int
) -> tuple[Int[Array, "B C"], Bool[Array, "B C"], Bool[Array, "B S"]]:
    """The ``slots`` valid tokens of largest weight in each row.

    Returns:
      The token of each slot, which slots hold a valid one, and which tokens are chosen.
    """
    best, token = jax.lax.top_k(jnp.where(valid, weight, -jnp.inf), slots)
    taken = best > -jnp.inf
    mark = lambda empty, token, taken: empty.at[token].set(taken)
    return token, taken, jax.vmap(mark)(jnp.zeros(valid.shape, bool), token, taken)


def cross_entropy(
    logit: Float[Array, "B S"], target: Bool[Array, "B S"], valid: Bool[Array, "B S"]
) -> Float[Array, ""]:
    """Mean binary cross-entropy over the valid tokens."""
    each = jax.nn.softplus(logit) - jnp.where(target, logit, 0.0)
    return jnp.sum(jnp.where(valid, each, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
