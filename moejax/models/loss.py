"""Cross-entropy of a language-model head in chunks, so that (B, S, V) logits never exist."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.models.head_chunks import one_hot, pick, sum_over_chunks


def chunked_cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int = 0,
) -> Float[Array, ""]:
    """Sum over tokens of weight · (logsumexp(logits) - logits[target]), in nats and float32.

    Args:
      hidden: final hidden states; products run in their type, sums in float32.
      head: output matrix.
      targets: next tokens.
      weights: weight of each token, 0 for padding; not differentiated.
      chunk: positions of each row whose logits exist at once; 0 means all. Where the length of rows
        is cut over the mesh, each device has its share of them, from its own positions.

    Returns:
      The weighted sum of negative log-likelihoods.
    """
    return sum_over_chunks(_nll, hidden, head, (targets, weights), None, chunk)[0]


def chunked_cross_entropy_and_guess(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int = 0,
) -> tuple[Float[Array, ""], Int[Array, "B S"]]:
    """As ``chunked_cross_entropy``, and the likeliest token of every position, from one pass."""
    return sum_over_chunks(_nll_and_guess, hidden, head, (targets, weights), None, chunk)


def _nll(logits, part, whole):
    """Weighted sum of negative log-likelihoods, and its gradient with respect to the logits."""
    del whole
    targets, weights = part
    log_total = jax.nn.logsumexp(logits, axis=-1)
    nll = jnp.sum(weights * (log_total - pick(logits, targets)))
    softmax = jnp.exp(logits - log_total[..., None])
    return nll, weights[..., None] * (softmax - one_hot(targets, logits.shape[-1])), None


def _nll_and_guess(logits, part, whole):
    nll, d_logits, _ = _nll(logits, part, whole)
    return nll, d_logits, jnp.argmax(logits, axis=-1).astype(jnp.int32)
