"""Cross-entropy of a language-model head in chunks, so that (B, S, V) logits never exist.

Each chunk's gradient with respect to its logits is known as soon as the logits are, so the
forward pass of a differentiated loss also computes the gradients of the hidden states and of the
head; the backward pass only scales them. Nothing is computed twice.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.exchange import parts_of_length


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
    return _cross_entropy(hidden, head, targets, weights, chunk, False)[0]


def chunked_cross_entropy_and_guess(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int = 0,
) -> tuple[Float[Array, ""], Int[Array, "B S"]]:
    """As ``chunked_cross_entropy``, and the likeliest token of every position, from one pass."""
    return _cross_entropy(hidden, head, targets, weights, chunk, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden, head, targets, weights, chunk, guess):
    """The sum, and where ``guess`` is set the likeliest tokens (else None)."""

    def add(total, part):
        rows, target, weight = part
        logits = _logits(rows, head)
        return total + _weighted_nll(logits, target, weight)[0], _guess(logits, guess)

    parts = _split(hidden, targets, weights, chunk)
    total, pieces = jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)
    return total, _join(pieces, hidden)


def _guess(logits: Float[Array, "B c V"], guess: bool) -> Int[Array, "B c"] | None:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32) if guess else None


def _join(pieces, hidden):
    """Chunks, stacked in front, end to end again and without the padding; None stays None."""
    if pieces is None:
        return None
    rows, length = hidden.shape[:2]
    parts = parts_of_length(length)
    pieces = pieces.reshape(len(pieces), rows, parts, -1, *pieces.shape[3:])
    pieces = jnp.moveaxis(pieces, 0, 2).reshape(rows, parts, -1, *pieces.shape[4:])
    return pieces[:, :, : length // parts].reshape(rows, length, *pieces.shape[3:])


def _split(hidden, targets, weights, chunk):
    """The three arrays cut along S into chunks, stacked in front; the last is padded.

    A chunk has as many positions of every part that a row's length is cut into, so that none of
    them travels.
    """
    rows, length = hidden.shape[:2]
    parts = parts_of_length(length)
    size = min(-(-chunk // parts) or length // parts, length // parts)
    padding = -(length // parts) % size

    def cut(array):
        rest = array.shape[2:]
        array = array.reshape(rows, parts, -1, *rest)
        array = jnp.pad(array, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * len(rest))
        pieces = jnp.moveaxis(array.reshape(rows, parts, -1, size, *rest), 2, 0)
        return pieces.reshape(len(pieces), rows, parts * size, *rest)

    return cut(hidden), cut(targets), cut(weights)


def _logits(hidden: Float[Array, "B c D"], head: Float[Array, "D V"]) -> Float[Array, "B c V"]:
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _weighted_nll(logits, targets, weights):
    """Weighted sum of negative log-likelihoods, and the log-sum-exp (B, c)."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (log_total - chosen)), log_total


def _forward(hidden, head, targets, weights, chunk, guess):
    def add(carry, part):
        total, d_head = carry
        rows, target, weight = part
        logits = _logits(rows, head)
        nll, log_total = _weighted_nll(logits, target, weight)
        softmax = jnp.exp(logits - log_total[..., None])
        one_hot = jnp.arange(head.shape[1])[None, None, :] == target[..., None]
        d_logits = (weight[..., None] * (softmax - one_hot)).astype(rows.dtype)
        d_rows = jnp.matmul(d_logits, head.astype(rows.dtype).T)
        d_head += jnp.einsum("bcd,bcv->dv", rows, d_logits, preferred_element_type=jnp.float32)
        return (total + nll, d_head), (d_rows, _guess(logits, guess))

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    parts = _split(hidden, targets, weights, chunk)
    (total, d_head), (d_rows, guesses) = jax.lax.scan(add, start, parts)
    saved = (_join(d_rows, hidden), d_head.astype(head.dtype), weights)
    return (total, _join(guesses, hidden)), saved


def _backward(chunk, guess, saved, cotangents):
    del chunk, guess
    d_hidden, d_head, weights = saved
    scale = cotangents[0]  # the guesses are integers and have none
    scaled = lambda gradient: gradient * scale.astype(gradient.dtype)
    return scaled(d_hidden), scaled(d_head), None, jnp.zeros_like(weights)


_cross_entropy.defvjp(_forward, _backward)
