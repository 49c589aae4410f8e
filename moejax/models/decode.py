"""Completions of prompts: all of a prompt in one pass, then one token after another by a cache.

Rows are ragged: each stands at its own position of the cache and ends by itself. What is not a
row's own, padding behind its prompt and rows that have ended, is not routed to experts, and noise
depends on the row's seed and position, so a row's completion does not depend on the others.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from moejax.config import check, check_not_negative, check_positive
from moejax.models.cache import Caches, init_cache
from moejax.models.choosing import Choosing, draw, log_probs_of
from moejax.models.model_config import ModelConfig
from moejax.models.transformer import Transformer

Tree = Any


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Options of sampling (block ``sampling``).

    Attributes:
      max_tokens: tokens of a completion at most, the stop token included.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only the likeliest this many are drawn from; 0 means all.
      top_p: only the likeliest that together have this share, of what top_k left (nucleus
        sampling, arXiv 1904.09751).
      min_p: only tokens of at least this share of the likeliest's probability (arXiv 2407.01082).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_positive("sampling", self, "max_tokens")
        check_not_negative("sampling", self, "temperature", "top_k")
        check(
            self.temperature == 0 or self.temperature >= 1e-4, "sampling.temperature",
            self.temperature, "is too small to divide by; set 0 to take the likeliest token",
        )  # fmt: skip
        check(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "must be above 0, up to 1")
        check(0 <= self.min_p <= 1, "sampling.min_p", self.min_p, "must be from 0 to 1")

    def choosing(self, vocab_size: int) -> Choosing:
        """The options that programs take as arrays."""
        return Choosing(
            np.float32(self.temperature), np.int32(self.top_k), np.float32(self.top_p),
            np.float32(self.min_p), np.int32(vocab_size),
        )  # fmt: skip


@struct.dataclass
class Sampled:
    """Prompts and their completions; rows are prompt, completion, then zeros.

    Attributes:
      tokens: L is the prompts' width and ``max_tokens`` more.
      prompt_lengths: tokens of each prompt.
      lengths: prompt, completion and stop token together.
      finished: a stop token came.
      log_probs: at position t of token t + 1, under softmax(logits / temperature) over the
        vocabulary, before top-k, top-p and min-p cut it; at temperature 0 under softmax(logits). 0
        outside of the completion.
      experts: the routers' choices, as in the collection ``router_choice``: leaves (repeats, B, L,
        K), E where a position was not run. None where they were not asked for.
    """

    tokens: Int[Array, "B L"]
    prompt_lengths: Int[Array, " B"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    log_probs: Float[Array, "B L"]
    experts: Tree | None


def sample(
    config: ModelConfig,
    variables: dict,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    seeds: UInt32[Array, " B"],
    *,
    options: SamplingConfig,
    stop_ids: tuple[int, ...] = (),
    vocab_size: int | None = None,
    keep_experts: bool = False,
) -> Sampled:
    """Completes prompts.

    There is one program for a config, B, P, ``max_tokens`` and ``keep_experts``; other options and
    stop tokens run by the same.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      prompts: tokens, padded on the right.
      prompt_lengths: tokens of each prompt, at least 1.
      seeds: of each row's noise: row b draws the token after position t by ``fold_in(key(seeds[b]),
        t)``.
      options: how tokens are chosen.
      stop_ids: tokens that end a completion.
      vocab_size: ids of this and above (padding of the vocabulary) are never sampled; None means
        the model's.
      keep_experts: return the routers' choices.

    Raises:
      ConfigError: a prompt without tokens, a stop token or vocabulary that the model has not.
    """
    vocab_size = config.vocab_size if vocab_size is None else int(vocab_size)
    check_inputs(config, prompts, prompt_lengths, seeds, stop_ids, vocab_size)
    stops = np.full(max(4, 1 << (len(stop_ids) - 1).bit_length()), -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    return _sample(
        config, variables, prompts, prompt_lengths, seeds, options.choosing(vocab_size), stops,
        max_tokens=options.max_tokens, keep_experts=keep_experts,
    )  # fmt: skip


def check_inputs(config, prompts, prompt_lengths, seeds, stop_ids, vocab_size) -> None:
    """Raises ConfigError for what ``sample`` cannot complete."""
    shape = np.shape(prompts)
    check(len(shape) == 2, "sampling.prompts", shape, "must have two axes, rows and tokens")
    for name, values in (("prompt_lengths", prompt_lengths), ("seeds", seeds)):
        check(
            np.shape(values) == shape[:1], f"sampling.{name}", np.shape(values),
            f"must be one a row of the prompts, {shape[:1]}",
        )  # fmt: skip
    if not isinstance(prompt_lengths, jax.Array) or prompt_lengths.is_fully_addressable:
        lengths = np.asarray(prompt_lengths)
        wrong = lengths[(lengths < 1) | (lengths > shape[1])]
        check(
            not len(wrong), "sampling.prompt_lengths", wrong.tolist(),
            f"must be from 1 to {shape[1]}, the prompts' width; begin an empty text with the "
            "separator",
        )  # fmt: skip
    check(
        1 <= vocab_size <= config.vocab_size, "sampling.vocab_size", vocab_size,
        f"must be from 1 to model.vocab_size = {config.vocab_size}",
    )  # fmt: skip
    for stop in stop_ids:
        check(
            0 <= stop < vocab_size, "sampling.stop_ids", stop,
            f"is never sampled from a vocabulary of {vocab_size}; leave it out",
        )  # fmt: skip


@struct.dataclass
class _State:
    """What goes from one token to the next; see ``Sampled``. ``cache`` lacks each last token."""

    tokens: Int[Array, "B L"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    log_probs: Float[Array, "B L"]
    cache: Caches
    experts: Tree | None


@functools.partial(jax.jit, static_argnames=("config", "max_tokens", "keep_experts"))
def _sample(
    config, variables, prompts, prompt_lengths, seeds, choosing, stops, *, max_tokens, keep_experts
) -> Sampled:
    batch, width = prompts.shape
    prompt_lengths, seeds = prompt_lengths.astype(jnp.int32), seeds.astype(jnp.uint32)
    end = prompt_lengths + max_tokens
    model = Decoder(config, variables, keep_experts)

    def choose(state: _State, hidden: Float[Array, "B 1 D"], active: Bool[Array, " B"]) -> _State:
        at = state.lengths - 1
        log_probs = log_probs_of(model.logits(hidden)[:, 0], choosing)
        token = draw(log_probs, choosing, seeds, at)
        value = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
        stopped = jnp.any(token[:, None] == stops[None, :], axis=-1)
        return state.replace(
            tokens=put(state.tokens, token, jnp.where(active, at + 1, -1)),
            log_probs=put(state.log_probs, value, jnp.where(active, at, -1)),
            lengths=state.lengths + active, finished=state.finished | (active & stopped),
        )  # fmt: skip

    running = lambda state: ~state.finished & (state.lengths < end)

    def step(state: _State) -> _State:
        active, at = running(state), state.lengths - 1
        token = jnp.take_along_axis(state.tokens, at[:, None], axis=1)
        hidden, cache, chosen = model.run(token, active[:, None], state.cache)
        state = state.replace(cache=cache)
        if keep_experts:
            place = jnp.where(active, at, -1)
            into = lambda old, new: jax.vmap(put, (0, 0, None))(old, new[:, :, 0], place)
            state = state.replace(experts=jax.tree.map(into, state.experts, chosen))
        return choose(state, hidden, active)

    inside = jnp.arange(width)[None, :] < prompt_lengths[:, None]
    prompts = jnp.where(inside, prompts.astype(jnp.int32), 0)
    pad = lambda values, fill=0: pad_length(values, width + max_tokens, fill)
    cache = init_cache(config, batch, width + max_tokens)
    hidden, cache, chosen = model.run(prompts, inside, cache, fresh=True)
    hidden = jnp.take_along_axis(hidden, prompt_lengths[:, None, None] - 1, axis=1)
    if keep_experts:
        none = config.moe.num_experts if config.moe else 0
        mask = lambda leaf: jnp.where(inside[None, :, :, None], leaf, none)
        chosen = jax.tree.map(
            lambda leaf: pad_length(mask(leaf), width + max_tokens, none, 2), chosen
        )
    state = _State(
        pad(prompts), prompt_lengths, jnp.zeros(batch, bool),
        jnp.zeros((batch, width + max_tokens), jnp.float32), cache, chosen,
    )  # fmt: skip
    state = choose(state, hidden, jnp.ones(batch, bool))
    state = jax.lax.while_loop(lambda state: jnp.any(running(state)), step, state)
    sampled = Sampled(
        state.tokens, prompt_lengths, state.lengths, state.finished, state.log_probs, state.experts
    )
    if not jax.sharding.get_abstract_mesh().empty:  # every process reads them
        everywhere = jax.sharding.PartitionSpec()
        sampled = jax.lax.with_sharding_constraint(sampled, everywhere)
    return sampled


class Decoder:
    """A model's passes with a cache.

    Args:
      config: its config.
      variables: its parameters and router state.
      keep_experts: passes return the routers' choices.
    """

    def __init__(self, config: ModelConfig, variables: dict, keep_experts: bool):
        self._model, self._variables = Transformer(config), variables
        self._mutable = ["router_choice"] if keep_experts else False

    def run(
        self,
        tokens: Int[Array, "B S"],
        valid: Bool[Array, "B S"],
        cache: Caches,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B S D"], Caches, Tree | None]:
        """Hidden states, the cache after the call, and the experts chosen, if they are kept."""
        out = self._model.apply(
            self._variables, tokens, valid.astype(jnp.int32), cache=cache, fresh=fresh,
            method=Transformer.encode, mutable=self._mutable,
        )  # fmt: skip
        out, kept = out if self._mutable else (out, None)
        return out.hidden, out.cache, None if kept is None else kept.get("router_choice", {})

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """The head's."""
        return self._model.apply(self._variables, hidden, method=Transformer.logits)


def put(rows: Array, values: Array, at: Int[Array, " B"]) -> Array:
    """Rows (B, L, ...) with values (B, ...) at a position of each; none where that is below 0."""
    at = jnp.where(at < 0, rows.shape[1], at)
    return jax.vmap(lambda row, value, at: row.at[at].set(value, mode="drop"))(rows, values, at)


def pad_length(values: Array, length: int, fill: int, axis: int = 1) -> Array:
    """An axis made longer by ``fill``."""
    widths = [(0, length - size if i == axis else 0) for i, size in enumerate(values.shape)]
    return jnp.pad(values, widths, constant_values=fill)
