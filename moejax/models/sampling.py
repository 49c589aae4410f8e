"""Text from a model: cached decoding of one token after another, in one compiled loop."""

import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.models.cache import init_cache
from moejax.models.model_config import ModelConfig
from moejax.models.transformer import Transformer


@functools.partial(jax.jit, static_argnames=("config", "length"))
def sample(
    config: ModelConfig,
    variables: dict,
    prompt: Int[Array, "B P"],
    prompt_length: Int[Array, " B"],
    key: Array,
    *,
    length: int,
    temperature: Float[Array, ""] | float = 1.0,
    vocab_size: Int[Array, ""] | int | None = None,
) -> Int[Array, "B length"]:
    """Continues prompts to ``length`` tokens each.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      prompt: first tokens of each row, padded on the right to a common P.
      prompt_length: tokens of each prompt that count, at least 1.
      key: PRNG key; row b at position i uses noise of ``fold_in(key, i)``.
      length: tokens of a row, prompt included; at least P.
      temperature: divides the logits; 0 takes the most likely token.
      vocab_size: ids of this and above (padding of the vocabulary) are never sampled.

    Returns:
      Prompt and continuation of each row.
    """
    model = Transformer(config)
    batch, width = prompt.shape
    given = jnp.pad(prompt, ((0, 0), (0, length - width)))
    limit = config.vocab_size if vocab_size is None else vocab_size
    allowed = jnp.arange(config.vocab_size)[None, :] < limit

    def choose(logits: Float[Array, "B V"], i: Int[Array, ""]) -> Int[Array, " B"]:
        logits = jnp.where(allowed, logits, -jnp.inf)
        noise = jax.random.gumbel(jax.random.fold_in(key, i), logits.shape)
        return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)

    def body(carry, i):
        tokens, cache = carry
        current = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
        out = model.apply(variables, current, cache=cache)
        following = jnp.where(
            i + 1 < prompt_length,
            jax.lax.dynamic_slice_in_dim(given, i + 1, 1, axis=1)[:, 0],
            choose(out.logits[:, 0], i),
        )
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, following[:, None], i + 1, axis=1)
        return (tokens, out.cache), None

    start = (given, init_cache(config, batch, length))
    (tokens, _), _ = jax.lax.scan(body, start, jnp.arange(length - 1))
    if not jax.sharding.get_abstract_mesh().empty:  # every process reads the text
        tokens = jax.lax.with_sharding_constraint(tokens, jax.sharding.PartitionSpec())
    return tokens


class TextTokenizer(Protocol):
    """What ``generate`` needs of a tokenizer."""

    separator: int
    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def generate(
    config: ModelConfig,
    variables: dict,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    count: int = 1,
) -> list[str]:
    """Continues a text, as a document's beginning.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      tokenizer: the one it was trained with.
      prompt: the text's beginning; may be empty.
      tokens: tokens to add at most; the end of the document ends the text.
      seed: of the sampling.
      temperature: divides the logits; 0 takes the most likely token.
      count: how many continuations.

    Returns:
      Prompt and continuation, ``count`` times.
    """
    start = [tokenizer.separator, *(int(i) for i in tokenizer.encode(prompt))]
    rows = jnp.broadcast_to(jnp.asarray(start, jnp.int32)[None], (count, len(start)))
    lengths = jnp.full(count, len(start), jnp.int32)
    sampled = sample(
        config, variables, rows, lengths, jax.random.key(seed), length=len(start) + tokens,
        temperature=jnp.float32(temperature), vocab_size=jnp.int32(tokenizer.vocab_size),
    )  # fmt: skip
    texts = []
    for row in np.asarray(sampled)[:, 1:].tolist():
        given = len(start) - 1
        rest = row[given:]
        end = rest.index(tokenizer.separator) if tokenizer.separator in rest else len(rest)
        texts.append(tokenizer.decode(row[:given] + rest[:end]))
    return texts
