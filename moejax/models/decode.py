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

from moejax.models.cache import Caches, init_cache
from moejax.models.choosing import Choosing, draw, log_probs_of
from moejax.models.model_config import ModelConfig
from moejax.models.sampling_config import SamplingConfig, check_inputs, check_speculation
from moejax.models.speculate import speculation
from moejax.models.transformer import Transformer
from moejax.models.unstacked import stack, unstack, unstack_cache, unstacked_config
from moejax.moe.choose import choose_here

Tree = Any


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
      drafted: tokens that the MTP module drafted; None without speculation.
      accepted: those that the model accepted.
    """

    tokens: Int[Array, "B L"]
    prompt_lengths: Int[Array, " B"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    log_probs: Float[Array, "B L"]
    experts: Tree | None
    drafted: Int[Array, " B"] | None = None
    accepted: Int[Array, " B"] | None = None


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
    speculate: int = 0,
) -> Sampled:
    """Completes prompts.

    There is one program for a config, B, P, ``max_tokens``, ``keep_experts`` and ``speculate``;
    other options and stop tokens run by the same.

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
      speculate: tokens that the MTP module drafts at a time; see ``moejax.models.speculate``.

    Raises:
      ConfigError: a prompt without tokens, a stop token or vocabulary that the model has not.
    """
    rows = (prompts, prompt_lengths, seeds)
    how = dict(max_tokens=options.max_tokens, keep_experts=keep_experts, speculate=speculate)
    rules = checked_rules(config, *rows, options, stop_ids, vocab_size, speculate)
    return sample_program(config, variables, prompts, prompt_lengths, rules, **how)


def checked_rules(
    config, prompts, prompt_lengths, seeds, options, stop_ids=(), vocab_size=None, speculate=0
) -> "Rules":
    """What ``sample`` tells its program, from what it is given; raises as it does."""
    vocab_size = config.vocab_size if vocab_size is None else int(vocab_size)
    check_inputs(config, prompts, prompt_lengths, seeds, stop_ids, vocab_size)
    check_speculation(config, speculate)
    return Rules.of(options, vocab_size, stop_ids, seeds)


@struct.dataclass
class Rules:
    """What a loop is told of its rows, as arrays.

    Attributes:
      choosing: how tokens are chosen.
      stops: tokens that end a completion; -1 for none.
      seeds: of the rows.
    """

    choosing: Choosing
    stops: Int[Array, " N"]
    seeds: UInt32[Array, " B"]

    @classmethod
    def of(cls, options: SamplingConfig, vocab_size: int, stop_ids, seeds) -> "Rules":
        """From what ``sample`` takes."""
        stops = np.full(max(4, 1 << (len(stop_ids) - 1).bit_length()), -1, np.int32)
        stops[: len(stop_ids)] = stop_ids
        return cls(options.choosing(vocab_size), stops, seeds)

    def stopped(self, tokens: Int[Array, "*n"]) -> Bool[Array, "*n"]:
        """Which tokens end a completion."""
        found = tokens.reshape(-1, 1) == self.stops[None, :]
        return jnp.any(found, axis=-1).reshape(tokens.shape)


@struct.dataclass
class State:
    """What goes from one step to the next; see ``Sampled``.

    Attributes:
      end: length that each row may reach.
      cache: holds all but each row's last token; of ``unstacked_config``.
      ahead: hidden state of the MTP module for the draft of each row's next token; None without
        speculation.
      drafted: drafts so far that were compared.
      accepted: those taken.
    """

    tokens: Int[Array, "B L"]
    prompt_lengths: Int[Array, " B"]
    lengths: Int[Array, " B"]
    end: Int[Array, " B"]
    finished: Bool[Array, " B"]
    log_probs: Float[Array, "B L"]
    experts: Tree | None
    cache: Caches
    ahead: Float[Array, "B 1 D"] | None
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]

    @property
    def running(self) -> Bool[Array, " B"]:
        """Rows that have not ended."""
        return ~self.finished & (self.lengths < self.end)

    def appended(
        self, tokens: Int[Array, "B n"], log_probs: Float[Array, "B n"], count: Int[Array, " B"],
        rules: Rules,
    ) -> "State":  # fmt: skip
        """With the first ``count`` of n tokens more on each row."""
        new = self
        for i in range(tokens.shape[1]):
            taken, at = i < count, self.lengths + i
            new = new.replace(
                tokens=put(new.tokens, tokens[:, i], jnp.where(taken, at, -1)),
                log_probs=put(new.log_probs, log_probs[:, i], jnp.where(taken, at - 1, -1)),
                finished=new.finished | (taken & rules.stopped(tokens[:, i])),
            )
        return new.replace(lengths=self.lengths + count)

    def with_experts(self, chosen: Tree, count: Int[Array, " B"]) -> "State":
        """With the choices for the first ``count`` tokens of a pass from the last token on."""
        experts = self.experts
        for i in range(jax.tree.leaves(chosen)[0].shape[2] if jax.tree.leaves(chosen) else 0):
            at = jnp.where(i < count, self.lengths - 1 + i, -1)
            into = lambda old, new, i=i, at=at: jax.vmap(put, (0, 0, None))(old, new[:, :, i], at)
            experts = jax.tree.map(into, experts, chosen)
        return self.replace(experts=experts)


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

    def draft(
        self,
        hidden: Float[Array, "B S D"],
        following: Int[Array, "B S"],
        valid: Bool[Array, "B S"],
        cache: Caches,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B S D"], Caches]:
        """Hidden states of the first MTP module, and the cache after the call."""
        out = self._model.apply(
            self._variables, 0, hidden, following, cache, valid, fresh, method=Transformer.draft
        )
        return out.hidden, out.cache

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """The head's."""
        return self._model.apply(self._variables, hidden, method=Transformer.logits)


def begin(
    config: ModelConfig,
    variables: dict,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    rules: Rules,
    max_tokens: int,
    keep_experts: bool,
    speculate: int,
) -> State:
    """All prompts in one pass, and the first token of each completion."""
    batch, width = prompts.shape
    length, prompt_lengths = width + max_tokens, prompt_lengths.astype(jnp.int32)
    inside = jnp.arange(width)[None, :] < prompt_lengths[:, None]
    prompts = jnp.where(inside, prompts.astype(jnp.int32), 0)
    model = Decoder(config, variables, keep_experts)
    cache = init_cache(config, batch, length + speculate, mtp=speculate > 0, ahead=speculate)
    hidden, cache, chosen = model.run(prompts, inside, cache, fresh=True)
    none = config.moe.num_experts if config.moe else 0
    grow = lambda leaf: pad_length(
        jnp.where(inside[None, :, :, None], leaf, none), length, none, axis=2
    )
    zeros = jnp.zeros(batch, jnp.int32)
    state = State(
        pad_length(prompts, length), prompt_lengths, prompt_lengths, prompt_lengths + max_tokens,
        jnp.zeros(batch, bool), jnp.zeros((batch, length), jnp.float32),
        jax.tree.map(grow, chosen), cache, None, zeros, zeros,
    )  # fmt: skip
    state = _choose(model, state, last(hidden, prompt_lengths), jnp.ones(batch, bool), rules)
    if speculate:
        following = state.tokens[:, 1 : width + 1]
        ahead, cache = model.draft(hidden, following, inside, state.cache, fresh=True)
        state = state.replace(ahead=last(ahead, prompt_lengths), cache=cache)
    return everywhere(state.replace(cache=unstack_cache(config, state.cache)))


def advance(
    config: ModelConfig,
    layers: dict,
    state: State,
    rules: Rules,
    limit: Int[Array, ""],
    keep_experts: bool,
    speculate: int,
) -> State:
    """Steps until all rows have ended or are ``limit`` tokens beyond their prompts, or just above.

    Args:
      config: the model's config.
      layers: of ``unstack``.
      state: of ``begin``, or of an earlier call.
      rules: what the loop is told of its rows.
      limit: tokens of completions.
      keep_experts: as in ``begin``.
      speculate: as in ``begin``.
    """
    one_by_one = decode_config(config, len(state.tokens))
    model = Decoder(one_by_one, layers, keep_experts)
    if keep_experts:
        state = state.replace(experts=unstack(config, {"choice": state.experts})["choice"])
    ahead = lambda state: state.running & (state.lengths - state.prompt_lengths < limit)

    def step(state: State) -> State:
        active = ahead(state)
        if speculate:
            return speculation(model, state, active, rules, speculate)
        token = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
        hidden, cache, chosen = model.run(token, active[:, None], state.cache)
        state = state.replace(cache=cache)
        if keep_experts:
            state = state.with_experts(chosen, active.astype(jnp.int32))
        return _choose(model, state, hidden, active, rules)

    state = jax.lax.while_loop(lambda state: jnp.any(ahead(state)), step, state)
    if keep_experts:
        state = state.replace(experts=stack(config, state.experts))
    return everywhere(state)


def decode_config(config: ModelConfig, rows: int) -> ModelConfig:
    """The model as it runs token by token: layers one by one, and experts by what is fast then."""
    config, moe = unstacked_config(config), config.moe
    if moe is None or choose_here(moe).dispatch != "blocks" or config.precision != "native":
        return config
    if rows * moe.top_k < moe.num_experts:  # most experts have nothing to do
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(moe, dispatch="rounds"))


def _choose(
    model: Decoder,
    state: State,
    hidden: Float[Array, "B 1 D"],
    active: Bool[Array, " B"],
    rules: Rules,
) -> State:
    """The next token of each active row."""
    log_probs = log_probs_of(model.logits(hidden)[:, 0], rules.choosing)
    token = draw(log_probs, rules.choosing, rules.seeds, state.lengths - 1)[:, None]
    value = jnp.take_along_axis(log_probs, token, axis=-1)
    return state.appended(token, value, active.astype(jnp.int32), rules)


@functools.partial(jax.jit, static_argnames=("config", "max_tokens", "keep_experts", "speculate"))
def sample_program(
    config, variables, prompts, prompt_lengths, rules, *, max_tokens, keep_experts, speculate=0
) -> Sampled:
    """The program of ``sample``, for who compiles it beforehand."""
    how = (keep_experts, speculate)
    state = begin(config, variables, prompts, prompt_lengths, rules, max_tokens, *how)
    layers = unstack(config, variables)
    state = advance(config, layers, state, rules, jnp.int32(max_tokens), *how)
    counts = (state.drafted, state.accepted) if speculate else (None, None)
    return Sampled(
        state.tokens, state.prompt_lengths, state.lengths, state.finished, state.log_probs,
        state.experts, *counts,
    )  # fmt: skip


def last(values: Float[Array, "B S D"], count: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    """The last of each row's first ``count``, at least 1."""
    return jnp.take_along_axis(values, count[:, None, None] - 1, axis=1)


def put(rows: Array, values: Array, at: Int[Array, " B"]) -> Array:
    """Rows (B, L, ...) with values (B, ...) at a position of each; none where that is below 0."""
    at = jnp.where(at < 0, rows.shape[1], at)
    return jax.vmap(lambda row, value, at: row.at[at].set(value, mode="drop"))(rows, values, at)


def pad_length(values: Array, length: int, fill: int = 0, axis: int = 1) -> Array:
    """An axis made longer by ``fill``."""
    widths = [(0, length - size if i == axis else 0) for i, size in enumerate(values.shape)]
    return jnp.pad(values, widths, constant_values=fill)


def everywhere(state: State) -> State:
    """All but the cache on every device, so that every process reads it."""
    if jax.sharding.get_abstract_mesh().empty:
        return state
    whole = lambda values: jax.lax.with_sharding_constraint(values, jax.sharding.PartitionSpec())
    names = ("tokens", "lengths", "finished", "log_probs", "experts", "prompt_lengths")
    return state.replace(**{name: jax.tree.map(whole, getattr(state, name)) for name in names})
