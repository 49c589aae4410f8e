"""Routers whose choice is not learned: by the token's id, or by chance. Gates may be learned."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from moejax.config import check, check_not_negative, check_positive
from moejax.moe.routers.base import Card, Router, RouterCounts, RouterInputs, RouterOptions, Routing
from moejax.moe.routers.top_k import Score, gates, normalized, score


@dataclasses.dataclass(frozen=True)
class FixedOptions(RouterOptions):
    """Options of the gates of a fixed choice.

    Attributes:
      learned_gate: gates are scores of the chosen experts; else each is 1/K, and the router has no
        parameter.
      score: from logits to scores: ``softmax``, ``sigmoid`` or ``sqrt_softplus``.
      normalize_gates: divide the chosen scores by their sum: with ``softmax``, a softmax over the
        chosen logits.
      routed_scale: factor on the gates.
      seed: of the hash; not below zero.
    """

    learned_gate: bool = True
    score: Score = "sigmoid"
    normalize_gates: bool = False
    routed_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("router", self, "routed_scale")
        check_not_negative("router", self, "seed")

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            not (self.learned_gate and self.normalize_gates and top_k == 1),
            "router.normalize_gates", True,
            "with moe.top_k = 1 makes every gate the same, so the router learns nothing from the "
            "loss; set it to False, or router.learned_gate to False",
        )  # fmt: skip

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        if self.learned_gate:
            return super().counts(d_model, num_experts, top_k)
        return RouterCounts(0, 0.0, float(top_k))


class FixedRouter(Router):
    """Base of the routers with a fixed choice: a subclass defines ``choose``."""

    def choose(self, inputs: RouterInputs) -> Int[Array, "T K"]:
        """K different experts for every token."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: FixedOptions = self.options
        expert = self.choose(inputs)
        if not o.learned_gate:
            # XLA folds sums of constants at compile time, and takes minutes over them.
            nothing = jnp.zeros((len(expert), self.num_experts), jnp.float32)
            logits = jax.lax.optimization_barrier(nothing)
            gate = jnp.full(expert.shape, o.routed_scale / self.top_k, jnp.float32)
            return self.finish(inputs, logits, jax.nn.softmax(logits, axis=-1), expert, gate)
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        scores = score(o.score, logits)
        gate = gates(scores, expert, o.normalize_gates, o.routed_scale)
        return self.finish(inputs, logits, normalized(o.score, scores), expert, gate)


@dataclasses.dataclass(frozen=True)
class HashOptions(FixedOptions):
    """A balanced hash and sigmoid gates; the paper has no gate: set ``learned_gate`` to False.

    Attributes:
      balanced: of any E ids that follow a multiple of E, every expert gets K; else experts are
        drawn for each id by itself. Ids of most tokenizers are ordered by frequency, so that the
        first balances the load better.
    """

    name: str = "hash"
    balanced: bool = True


class HashRouter(FixedRouter):
    """K different experts by the token's id alone, the same throughout training. Stateless.

    The table is computed from the id by integer arithmetic and holds for any vocabulary. Causal.

    Sources: Hash layers (arXiv 2106.04426, section 3), whose balanced hash counts how often each
    token occurs, where this one goes by the order of the ids; DeepSeek-V4, whose first layers give
    each id K experts with learned gates (``score`` sqrt_softplus, ``normalize_gates``), from a
    table that its checkpoint holds.

    Raises:
      ValueError: the inputs hold no token ids.
    """

    Options: ClassVar[type[RouterOptions]] = HashOptions
    card: ClassVar[Card] = Card(
        "experts by a hash of the token's id, gates learned or equal", "Hash layers, 2106.04426",
        "", "the choice that learns nothing: a baseline, first layers",
    )  # fmt: skip

    def choose(self, inputs: RouterInputs) -> Int[Array, "T K"]:
        """The experts of each token's id; raises ValueError without ids."""
        if inputs.tokens is None:
            raise ValueError("router hash chooses by token ids: set RouterInputs.tokens")
        token = inputs.tokens.reshape(-1).astype(jnp.uint32)
        if not self.options.balanced:
            return distinct(hashed(token, self.options.seed, self.top_k), self.num_experts)
        # Every E ids in a row are shifted alike: each of the K choices hits every expert once.
        experts = jnp.uint32(self.num_experts)
        bits = hashed(token // experts, self.options.seed, self.top_k)
        shift = distinct(bits, self.num_experts)
        place = (token % experts).astype(jnp.int32)[:, None]
        return (place + shift) % self.num_experts


@dataclasses.dataclass(frozen=True)
class RandomOptions(FixedOptions):
    """Equal gates: nothing is learned."""

    name: str = "random"
    learned_gate: bool = False


class RandomRouter(FixedRouter):
    """K different experts, uniformly at random; worse than a dense layer of the same work.

    Drawn anew in training. In evaluation by a fixed hash of a token's position and id, whichever
    are known, so that a text is always routed alike. Causal, stateless.
    """

    Options: ClassVar[type[RouterOptions]] = RandomOptions
    card: ClassVar[Card] = Card(
        "uniformly random experts, equal gates", "", "", "the floor that any router must beat",
    )  # fmt: skip

    def choose(self, inputs: RouterInputs) -> Int[Array, "T K"]:
        shape = inputs.valid.shape
        if inputs.train:
            size = (shape[0] * shape[1], self.top_k)
            bits = jax.random.bits(self.make_rng("router"), size, jnp.uint32)
            return distinct(bits, self.num_experts)
        position = inputs.positions
        if position is None:
            position = jnp.broadcast_to(jnp.arange(shape[1])[None, :], shape)
        tokens = jnp.zeros(shape, jnp.int32) if inputs.tokens is None else inputs.tokens
        flat = lambda values: values.reshape(-1).astype(jnp.uint32)
        both = _mix(flat(position)) ^ flat(tokens)
        return distinct(hashed(both, self.options.seed, self.top_k), self.num_experts)


def hashed(key: UInt[Array, " T"], seed: int, count: int) -> UInt[Array, "T K"]:
    """``count`` numbers of 32 pseudo-random bits for every key."""
    start = _mix(key ^ _mix(jnp.uint32(seed % 2**32) + jnp.uint32(0x9E3779B9)))
    turn = _mix(jnp.arange(1, count + 1, dtype=jnp.uint32))
    return _mix(start[:, None] + turn[None, :])


def _mix(bits: UInt[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """A permutation of 32 bits in which every bit depends on all: multiply and shift, twice."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def distinct(bits: UInt[Array, "T K"], choices: int) -> Int[Array, "T K"]:
    """K different numbers below ``choices`` from K random ones, all sets equally likely.

    Floyd's sampling: the k-th is drawn below choices - K + k, and where it is taken already, that
    bound itself is taken. Which set comes is uniform, their order is not.
    """
    chosen: list[Int[Array, " T"]] = []
    for k in range(bits.shape[1]):
        bound = choices - bits.shape[1] + k
        draw = (bits[:, k] % jnp.uint32(bound + 1)).astype(jnp.int32)
        for earlier in list(chosen):
            draw = jnp.where(draw == earlier, bound, draw)
        chosen.append(draw)
    return jnp.stack(chosen, axis=1)
