"""The distribution that a token is drawn from, and the draw."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from moejax.models.log_probs import NEVER


@struct.dataclass
class Choosing:
    """How tokens are chosen, as arrays, so that other values need no other program.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: the likeliest that are kept; 0 for all.
      top_p: the likeliest are kept until they have this share.
      min_p: kept are those of at least this share of the likeliest's probability.
      vocab_size: ids of this and above are never chosen.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    vocab_size: Int[Array, ""]


def log_probs_of(logits: Float[Array, "B V"], choosing: Choosing) -> Float[Array, "B V"]:
    """Log-probabilities over the vocabulary at the temperature, undivided where that is 0."""
    divisor = jnp.where(choosing.temperature > 0, choosing.temperature, 1.0)
    allowed = jnp.arange(logits.shape[-1])[None, :] < choosing.vocab_size
    return jax.nn.log_softmax(jnp.where(allowed, logits / divisor, NEVER), axis=-1)


def kept(log_probs: Float[Array, "B V"], choosing: Choosing) -> Bool[Array, "B V"]:
    """Which tokens may be drawn: first top-k, then top-p of what it left, then min-p.

    Equal probabilities at a limit are kept all. Instead of a sort, which takes several times as
    long, the limits are found bit by bit.
    """
    allowed = jnp.arange(log_probs.shape[-1])[None, :] < choosing.vocab_size

    def cut():
        probs = jnp.where(allowed, jnp.exp(log_probs), 0.0)
        count = jnp.where(choosing.top_k > 0, choosing.top_k, probs.shape[-1])
        least = _greatest(probs, lambda keep: jnp.sum(keep, axis=-1) >= count)
        left = jnp.where((choosing.top_k > 0) & (probs < least), 0.0, probs)
        wanted = choosing.top_p * jnp.sum(left, axis=-1)
        mass = lambda keep: jnp.sum(jnp.where(keep, left, 0.0), axis=-1)
        share = jnp.where(choosing.top_p < 1, _greatest(left, lambda keep: mass(keep) >= wanted), 0)
        floor = choosing.min_p * jnp.max(probs, axis=-1, keepdims=True)
        keep = allowed & (left >= share) & (left >= floor)
        return keep & ((left > 0) | (choosing.top_k == 0))

    cuts = (choosing.top_k > 0) | (choosing.top_p < 1) | (choosing.min_p > 0)
    return jax.lax.cond(cuts, cut, lambda: jnp.broadcast_to(allowed, log_probs.shape))


def _greatest(
    values: Float[Array, "B V"], enough: Callable[[Array], Bool[Array, " B"]]
) -> Float[Array, "B 1"]:
    """The greatest limit of each row for which ``enough(values >= limit)``; 0 if there is none.

    Bits of floats that are not negative are in the floats' order.
    """

    def add(i, found):
        more = found | (jnp.int32(1) << (30 - i))
        limit = jax.lax.bitcast_convert_type(more, jnp.float32)
        return jnp.where(enough(values >= limit[:, None]), more, found)

    bits = jax.lax.fori_loop(0, 31, add, jnp.zeros(len(values), jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]


def row_keys(seeds: UInt32[Array, " B"], at: Int[Array, " B"], use: int = 0) -> Array:
    """A key for each row, of its seed and position only; ``use`` tells several draws apart."""

    def key(seed, at):
        found = jax.random.fold_in(jax.random.key(seed), at)
        return jax.random.fold_in(found, use) if use else found

    return jax.vmap(key)(seeds, at)


def noisy_argmax(log_probs: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
    """A draw of each row from probabilities that need not sum to 1 (the Gumbel-max trick)."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[1:]))(keys)
    return jnp.argmax(log_probs + noise, axis=-1).astype(jnp.int32)


def draw(
    log_probs: Float[Array, "B V"],
    choosing: Choosing,
    seeds: UInt32[Array, " B"],
    at: Int[Array, " B"],
    use: int = 0,
) -> Int[Array, " B"]:
    """A token of each row, by noise that depends on the row's seed and position only.

    Args:
      log_probs: of ``log_probs_of``.
      choosing: what may be drawn.
      seeds: of the rows.
      at: position of the row's last token.
      use: as in ``row_keys``.
    """

    def noisy():
        left = jnp.where(kept(log_probs, choosing), log_probs, -jnp.inf)
        return noisy_argmax(left, row_keys(seeds, at, use))

    likeliest = lambda: jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
    return jax.lax.cond(choosing.temperature > 0, noisy, likeliest)


def distribution(log_probs: Float[Array, "B V"], choosing: Choosing) -> Float[Array, "B V"]:
    """The probabilities that ``draw`` draws with; at temperature 0, all on the likeliest token."""

    def cut():
        return jax.nn.softmax(jnp.where(kept(log_probs, choosing), log_probs, -jnp.inf), axis=-1)

    likeliest = lambda: jax.nn.one_hot(
        jnp.argmax(log_probs, axis=-1), log_probs.shape[-1], dtype=log_probs.dtype
    )
    return jax.lax.cond(choosing.temperature > 0, cut, likeliest)
