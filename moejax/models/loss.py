"""Cross-entropy of a language-model head in chunks, so that (B, S, V) logits never exist.

Each chunk's gradient with respect to its logits is known as soon as the logits are, so the
forward pass of a differentiated loss also computes the gradients of the hidden states and of the
head; the backward pass only scales them. Nothing is computed twice.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
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
      chunk: positions of each row whose logits exist at once; 0 means all.

    Returns:
      The weighted sum of negative log-likelihoods.
    """

    def add(total, part):
        rows, target, weight = part
        return total + _weighted_nll(_logits(rows, head), target, weight)[0], None

    parts = _split(hidden, targets, weights, chunk)
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]


def _split(hidden, targets, weights, chunk):
    """The three arrays cut along S into chunks, stacked in front; the last is padded."""
    size = min(chunk or hidden.shape[1], hidden.shape[1])
    padding = -hidden.shape[1] % size

    def cut(array):
        array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        pieces = array.reshape(array.shape[0], -1, size, *array.shape[2:])
        return jnp.moveaxis(pieces, 1, 0)

    return cut(hidden), cut(targets), cut(weights)


def _logits(hidden: Float[Array, "B c D"], head: Float[Array, "D V"]) -> Float[Array, "B c V"]:
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _weighted_nll(logits, targets, weights):
    """Weighted sum of negative log-likelihoods, and the log-sum-exp (B, c)."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (log_total - chosen)), log_total


def _forward(hidden, head, targets, weights, chunk):
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
        return (total + nll, d_head), d_rows

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), pieces = jax.lax.scan(add, start, _split(hidden, targets, weights, chunk))
    d_hidden = jnp.moveaxis(pieces, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return total, (d_hidden[:, : hidden.shape[1]], d_head.astype(head.dtype), weights)


def _backward(chunk, saved, scale):
    del chunk
    d_hidden, d_head, weights = saved
    scaled = lambda gradient: gradient * scale.astype(gradient.dtype)
    return scaled(d_hidden), scaled(d_head), None, jnp.zeros_like(weights)


chunked_cross_entropy.defvjp(_forward, _backward)
