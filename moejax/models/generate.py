"""Text from a model: prompts and completions as strings, shown as they are made."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models.decode import Rules, State, advance, begin
from moejax.models.model_config import ModelConfig
from moejax.models.sampling_config import SamplingConfig, check_inputs, check_speculation
from moejax.models.unstacked import unstack

# Tokens between two looks at the text.
CHUNK = 16
# Prompts are padded to a power of two from here on, so that few programs serve all.
SMALLEST_WIDTH = 16
# What a decoder writes for bytes that are not UTF-8, or not yet.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer(Protocol):
    """What ``generate`` needs of a tokenizer."""

    separator: int
    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Generated:
    """Continued texts.

    Attributes:
      texts: prompt and continuation of each.
      tokens: tokens made, of all of them, the document's end included.
      seconds: that it took, without compilation.
      accepted_share: of drafted tokens; None without speculation.
    """

    texts: list[str]
    tokens: int
    seconds: float
    accepted_share: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of all texts together, the prompts' passes included."""
        return self.tokens / self.seconds


# As ``sample`` runs them, but apart: between them the text is looked at.
_begin = functools.partial(
    jax.jit, static_argnames=("config", "max_tokens", "keep_experts", "speculate")
)(begin)
_unstack = jax.jit(unstack, static_argnames="config")
_advance = functools.partial(
    jax.jit, static_argnames=("config", "keep_experts", "speculate"), donate_argnames="state"
)(advance)


def generate(
    config: ModelConfig,
    variables: dict,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    options: SamplingConfig,
    seed: int = 0,
    count: int = 1,
    stops: Sequence[str] = (),
    speculate: int = 0,
    show: Callable[[str], None] | None = None,
) -> Generated:
    """Continues a text, as a document's beginning.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      tokenizer: the one it was trained with.
      prompt: the text's beginning; may be empty.
      options: how tokens are chosen; ``max_tokens`` are added at most. The end of the document
        ends the text.
      seed: of the sampling.
      count: how many continuations.
      stops: texts that end a continuation; what comes before them stays.
      speculate: as in ``moejax.models.decode.sample``.
      show: is given the first text's pieces as they are made, the prompt first.

    Raises:
      ConfigError: as ``sample``.
    """
    start = [tokenizer.separator, *(int(i) for i in tokenizer.encode(prompt))]
    rows = np.zeros((count, bucket(len(start))), np.int32)
    rows[:, : len(start)] = start
    lengths = np.full(count, len(start), np.int32)
    seeds = np.random.SeedSequence(seed).generate_state(count)
    check_inputs(config, rows, lengths, seeds, (tokenizer.separator,), tokenizer.vocab_size)
    check_speculation(config, speculate)
    rules = Rules.of(options, tokenizer.vocab_size, (tokenizer.separator,), seeds)
    first = functools.partial(
        _begin, config, variables, rows, lengths, rules, max_tokens=options.max_tokens,
        keep_experts=False, speculate=speculate,
    )  # fmt: skip
    layers = _unstack(config, variables)
    further = functools.partial(_advance, config, layers, keep_experts=False, speculate=speculate)
    # Both programs are compiled before the clock starts; a limit of 0 makes no steps.
    jax.block_until_ready(further(first(), rules, jnp.int32(0)).tokens)
    texts = [_Text(tokenizer, start, prompt, stops, show if i == 0 else None) for i in range(count)]
    began, made, state = time.perf_counter(), 1, first()
    while True:
        over = _read(texts, state)
        if over:
            break
        made += CHUNK
        state = further(state, rules, jnp.int32(made))
    seconds = time.perf_counter() - began
    tokens = int(np.sum(np.asarray(state.lengths) - len(start)))
    share = None
    if speculate:
        share = float(jnp.sum(state.accepted) / jnp.maximum(jnp.sum(state.drafted), 1))
    return Generated([prompt + text.shown for text in texts], tokens, seconds, share)


def bucket(length: int) -> int:
    """The next power of two, from ``SMALLEST_WIDTH`` on."""
    return max(SMALLEST_WIDTH, 1 << (length - 1).bit_length())


def _read(texts: Sequence["_Text"], state: State) -> bool:
    """Gives every text its tokens so far; whether all have ended."""
    rows, lengths, ended = jax.device_get((state.tokens, state.lengths, ~state.running))
    for text, row, length, end in zip(texts, rows, lengths, ended, strict=True):
        text.take(row[:length].tolist(), bool(end))
    return all(text.ended for text in texts)


class _Text:
    """One continuation as it grows.

    Attributes:
      shown: what will not change any more.
      ended: nothing more comes.
    """

    def __init__(self, tokenizer, start, prompt, stops, show):
        self._tokenizer, self._start, self._stops, self._show = tokenizer, start, stops, show
        self._before = len(tokenizer.decode(start[1:]))
        self.shown, self.ended = "", False
        if show:
            show(prompt)

    def take(self, row: list[int], final: bool) -> None:
        """The row as it is now; ``final`` where it has ended."""
        if self.ended:
            return
        own = row[len(self._start) :]
        if self._tokenizer.separator in own:
            own = own[: own.index(self._tokenizer.separator)]
        # Decoded with the prompt: some tokenizers write a first token differently.
        text = self._tokenizer.decode(row[1 : len(self._start)] + own)[self._before :]
        found = [text.find(stop) for stop in self._stops if stop and stop in text]
        if found:
            text, final = text[: min(found)], True
        safe = text if final else self._safe(text)
        if self._show and len(safe) > len(self.shown):
            self._show(safe[len(self.shown) :])
        self.shown, self.ended = safe, final

    def _safe(self, text: str) -> str:
        """What tokens to come cannot change: no piece of a character, or of a stop text."""
        text = text.rstrip(INCOMPLETE)
        held = 0
        for stop in self._stops:
            ends = (n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n]))
            held = max(held, next(ends, 0))
        safe = text[: len(text) - held]
        return safe if len(safe) > len(self.shown) else self.shown
