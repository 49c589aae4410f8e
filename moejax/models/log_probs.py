"""Log-probabilities and entropies of a language-model head in chunks of positions.

Unlike a loss, each position's value goes its own way, so its gradient is not known in the forward
pass; the backward pass computes each chunk's logits again, which costs one more product with the
head and keeps memory at one chunk's logits.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.models.head_chunks import head_logits, join, one_hot, pick, split, through_head

# Stands for minus infinity where a token cannot be sampled, so that 0 · log 0 is 0.
NEVER = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_log_probs(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    chunk: int = 0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Log-probability of the target and entropy of the distribution at every position.

    Both are of softmax(logits / temperature), the distribution that a sampler at that temperature
    draws from, and both can be differentiated with respect to ``hidden`` and ``head``.

    Args:
      hidden: final hidden states; products run in their type, the rest in float32.
      head: output matrix.
      targets: next tokens, below ``vocab_size``.
      chunk: positions of each row whose logits exist at once; 0 means all.
      temperature: above 0.
      vocab_size: ids of this and above (padding of the vocabulary) are never sampled; None: all of
        V are.

    Returns:
      Log-probabilities and entropies, in nats and float32.
    """
    return _scan(hidden, head, targets, chunk, temperature, vocab_size)


def _scan(hidden, head, targets, chunk, temperature, vocab_size):
    def one(_, pieces):
        rows, target = pieces
        log_probs = _log_softmax(rows, head, temperature, vocab_size)
        return None, (pick(log_probs, target), _entropy(log_probs))

    _, found = jax.lax.scan(one, None, split((hidden, targets), chunk))
    return join(found, hidden.shape[1])


def _log_softmax(rows, head, temperature, vocab_size) -> Float[Array, "B c V"]:
    logits = head_logits(rows, head) / temperature
    if vocab_size is not None and vocab_size < head.shape[1]:
        logits = jnp.where(jnp.arange(head.shape[1])[None, None] < vocab_size, logits, NEVER)
    return jax.nn.log_softmax(logits, axis=-1)


def _entropy(log_probs: Float[Array, "B c V"]) -> Float[Array, "B c"]:
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def _forward(hidden, head, targets, chunk, temperature, vocab_size):
    found = _scan(hidden, head, targets, chunk, temperature, vocab_size)
    return found, (hidden, head, targets, found[1])


def _backward(chunk, temperature, vocab_size, saved, cotangents):
    """d log p(a) / d logits = onehot(a) - p and dH / d logits = -p (log p + H)."""
    hidden, head, targets, entropy = saved

    def one(d_head, pieces):
        rows, target, entropy, to_log_prob, to_entropy = pieces
        log_probs = _log_softmax(rows, head, temperature, vocab_size)
        probs = jnp.exp(log_probs)
        d_logits = to_log_prob[..., None] * (one_hot(target, head.shape[1]) - probs)
        d_logits -= to_entropy[..., None] * probs * (log_probs + entropy[..., None])
        d_rows, more = through_head(rows, head, d_logits / temperature)
        return d_head + more, d_rows

    start = jnp.zeros(head.shape, jnp.float32)
    pieces = split((hidden, targets, entropy, *cotangents), chunk)
    d_head, d_rows = jax.lax.scan(one, start, pieces)
    return join(d_rows, hidden.shape[1]), d_head.astype(head.dtype), None


token_log_probs.defvjp(_forward, _backward)
