"""Balanced assignment of tokens to experts in training: BASE's auction and Sinkhorn's plan.

Both look at all tokens of a micro-batch, on whatever devices they are, and choose without a
gradient; gates come from the raw logits. In evaluation each token chooses for itself.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import check, check_positive
from moejax.moe import rowwise
from moejax.moe.routers.base import Card, Router, RouterInputs, RouterOptions, Routing
from moejax.moe.routers.stats import assignment_counts

# Stands for infinity where a difference of two infinities would be no number.
HUGE = 1e9


@dataclasses.dataclass(frozen=True)
class BaseLayersOptions(RouterOptions):
    """Defaults: the released code's step of bids.

    Attributes:
      bid_step: least rise of a bid, over the range of the logits: the assignment's value is below
        the best one's by at most this times the range for each token.
      max_rounds: rounds of bidding; tokens without an expert after them fill the free places.
    """

    leaks: ClassVar[bool] = True

    name: str = "base_layers"
    bid_step: float = 0.02
    max_rounds: int = 200

    def __post_init__(self) -> None:
        check_positive("router", self, "bid_step", "max_rounds")

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            top_k == 1, "moe.top_k", top_k,
            "router base_layers assigns one expert a token; set moe.top_k = 1",
        )  # fmt: skip


class BaseLayersRouter(Router):
    """One expert a token, all loads equal, their summed logits W x about as large as can be.

    Gate = sigmoid of the chosen logit. Loads differ by one where E does not divide the number of
    tokens; padding is not assigned. A round of the auction costs a sort of the tokens.

    Leaks in training: tokens compete for places. In evaluation each token takes its best expert,
    which is causal and not balanced.

    Source: BASE layers (arXiv 2103.16716, section 3, eq. 1 and 2) and its released code. There the
    tokens are shuffled over the devices and those of each device are assigned by themselves; here
    the whole micro-batch is assigned at once, so that the result does not depend on the mesh.
    """

    Options: ClassVar[type[RouterOptions]] = BaseLayersOptions
    card: ClassVar[Card] = Card(
        "balanced assignment by auction in training, the best expert in evaluation",
        "BASE, 2103.16716", "", "exact balance with one expert; leaks in training",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: BaseLayersOptions = self.options
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        fixed = jax.lax.stop_gradient(logits)
        if inputs.train:
            expert = auction(fixed, inputs.valid.reshape(-1), o.bid_step, o.max_rounds)
        else:
            expert = jnp.argmax(fixed, axis=-1)
        expert = expert[:, None]
        # Padding has no expert; the index only has to stay in range here.
        chosen = jnp.minimum(expert, self.num_experts - 1)
        gate = jax.nn.sigmoid(jnp.take_along_axis(logits, chosen, axis=-1))
        return self.finish(inputs, logits, jax.nn.softmax(logits, axis=-1), expert, gate)


def auction(
    scores: Float[Array, "T E"], valid: Bool[Array, " T"], bid_step: float, max_rounds: int
) -> Int[Array, " T"]:
    """An expert for each valid token, loads equal up to one, the sum of scores near its maximum.

    Bertsekas' auction with similar objects, all tokens bidding at once. A token without an expert
    bids for the one whose score less price is best, up to where its second best would do as well,
    and a step more. An expert keeps the highest bids that it has places for; once full, its price
    is the lowest of them. With lasting indecision the rounds end all the same, and the free places
    are filled in order.

    Args:
      scores: finite.
      valid: False for padding.
      bid_step: least rise of a bid, over the scores' range.
      max_rounds: the most rounds of bidding.

    Returns:
      Expert of each token; E for padding.
    """
    experts = scores.shape[1]
    total = jnp.sum(valid, dtype=jnp.int32)
    places = total // experts + (jnp.arange(experts) < total % experts)
    low = jnp.min(jnp.where(valid[:, None], scores, HUGE))
    high = jnp.max(jnp.where(valid[:, None], scores, -HUGE))
    step = jnp.maximum(bid_step * (high - low), 1e-6)
    free = lambda owner: valid & (owner == experts)

    def round_(state):
        owner, bid, price, rounds = state
        value = scores - price[None, :]
        best = jnp.argmax(value, axis=1).astype(jnp.int32)
        is_best = jnp.arange(experts)[None, :] == best[:, None]
        second = jnp.max(jnp.where(is_best, -HUGE, value), axis=1)
        offer = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0] - second + step
        wanted = jnp.where(free(owner), best, owner)
        bid = jnp.where(free(owner), offer, bid)
        kept = _rank(wanted, bid, experts) < jnp.append(places, 0)[wanted]
        full = assignment_counts(jnp.where(kept, wanted, experts), experts) == places
        lowest = jnp.full(experts + 1, HUGE).at[wanted].min(jnp.where(kept, bid, HUGE))[:-1]
        return jnp.where(kept, wanted, experts), bid, jnp.where(full, lowest, price), rounds + 1

    go_on = lambda state: jnp.any(free(state[0])) & (state[3] < max_rounds)
    nobody = jnp.full(len(scores), experts, jnp.int32)
    prices = jnp.where(places > 0, 0.0, HUGE)
    start = (nobody, jnp.zeros(len(scores)), prices, jnp.zeros((), jnp.int32))
    owner = jax.lax.while_loop(go_on, round_, start)[0]
    ends = jnp.cumsum(places - assignment_counts(owner, experts).astype(jnp.int32))
    turn = jnp.cumsum(free(owner), dtype=jnp.int32) - 1
    return jnp.where(free(owner), jnp.searchsorted(ends, turn, side="right"), owner)


def _rank(expert: Int[Array, " T"], bid: Float[Array, " T"], experts: int) -> Int[Array, " T"]:
    """Place of each token among those that want the same expert, the highest bid first."""
    order = jnp.lexsort((-bid, expert))
    count = jnp.bincount(expert, length=experts + 1)
    starts = jnp.cumsum(count) - count
    places = jnp.arange(len(expert), dtype=jnp.int32) - starts[expert[order]]
    return jnp.zeros_like(expert).at[order].set(places.astype(expert.dtype), unique_indices=True)


@dataclasses.dataclass(frozen=True)
class SBaseOptions(RouterOptions):
    """Defaults: Megatron-LM's tolerance; its loop has no bound.

    Attributes:
      iterations: the most iterations of Sinkhorn's algorithm.
      tolerance: they end when no expert's factor changes by more than this, relatively.
    """

    leaks: ClassVar[bool] = True

    name: str = "s_base"
    iterations: int = 100
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_positive("router", self, "iterations", "tolerance")


class SBaseRouter(Router):
    """Top-k of Sinkhorn's plan in training; gates from the raw logits. Stateless.

    The plan scales exp(W x) by a factor for each token and one for each expert until tokens have
    mass 1/T and experts 1/E. It selects only, without a gradient. Gate = sigmoid of the logit with
    K = 1, the softmax over all experts above, as in Megatron-LM. Loads are near equal, not equal.

    Leaks in training: an expert's factor depends on all tokens. In evaluation it is plain top-k of
    the logits, which is causal.

    Source: S-BASE (arXiv 2202.01169) and Megatron-LM's Sinkhorn router;
    here in the logarithm, which cannot overflow, over the valid tokens of the whole micro-batch.
    """

    Options: ClassVar[type[RouterOptions]] = SBaseOptions
    card: ClassVar[Card] = Card(
        "top-k of Sinkhorn's plan in training, of the logits in evaluation",
        "S-BASE, 2202.01169", "", "near balance without a loss; leaks in training",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: SBaseOptions = self.options
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        order = jax.lax.stop_gradient(logits)
        if inputs.train:
            # A token's own factor changes none of its order.
            valid = inputs.valid.reshape(-1)
            order = order + sinkhorn(order, valid, o.iterations, o.tolerance)[1][None, :]
        if self.top_k == 1:
            expert = jnp.argmax(order, axis=-1)[:, None]
        else:
            expert = rowwise.top_k(order, self.top_k)[1]
        probabilities = jax.nn.softmax(logits, axis=-1)
        scores = jax.nn.sigmoid(logits) if self.top_k == 1 else probabilities
        gate = jnp.take_along_axis(scores, expert, axis=-1)
        return self.finish(inputs, logits, probabilities, expert, gate)


def sinkhorn(
    logits: Float[Array, "T E"], valid: Bool[Array, " T"], iterations: int, tolerance: float
) -> tuple[Float[Array, " T"], Float[Array, " E"]]:
    """Factors of tokens and experts, as logarithms: f and g of the plan exp(logits + f + g).

    The plan's columns sum to 1/E, and its valid rows to 1/T the better the more it has converged;
    padding has no mass.

    Args:
      logits: finite.
      valid: False for padding.
      iterations: the most iterations.
      tolerance: ends them when no entry of g changes by more than this.
    """
    per_token = -jnp.log(jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32))
    per_expert = -jnp.log(jnp.float32(logits.shape[1]))

    def iterate(state):
        _, old, _, count = state
        of_tokens = per_token - jax.nn.logsumexp(logits + old[None, :], axis=1)
        of_tokens = jnp.where(valid, of_tokens, -HUGE)
        new = per_expert - jax.nn.logsumexp(logits + of_tokens[:, None], axis=0)
        return of_tokens, new, jnp.max(jnp.abs(new - old)), count + 1

    go_on = lambda state: (state[2] > tolerance) & (state[3] < iterations)
    tokens, experts = jnp.zeros(logits.shape[0]), jnp.zeros(logits.shape[1])
    start = (tokens, experts, jnp.float32(jnp.inf), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(go_on, iterate, start)[:2]
