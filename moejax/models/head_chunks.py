"""The language-model head in chunks of positions, so that (B, S, V) logits never exist.

What several losses share: rows cut into chunks, a chunk's logits, its gradient through the head,
and the sum over chunks of a loss whose gradient is known as soon as the logits are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.moe.exchange import parts_of_length

Tree = Any
# (logits (B, c, V), a chunk of the other arrays, the arrays that are not cut) -> the chunk's sum,
# its gradient with respect to the logits, and what is kept of each position, or None.
Term = Callable[[Array, Tree, Tree], tuple[Array, Array, Tree]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def sum_over_chunks(
    term: Term,
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    parts: Tree,
    whole: Tree,
    chunk: int,
) -> tuple[Float[Array, ""], Tree]:
    """The sum of ``term`` over all chunks, and what it kept of each position, joined again.

    The forward pass of a differentiated sum also computes the gradients of the hidden states and of
    the head; the backward pass only scales them. Nothing is computed twice. The sum must therefore
    be used as a scalar, weights included in the term.

    Args:
      term: a pure function that closes over no arrays.
      hidden: final hidden states; products run in their type, sums in float32.
      head: output matrix.
      parts: further arrays (B, S, ...), cut like ``hidden``; not differentiated.
      whole: further arrays that every chunk sees; not differentiated.
      chunk: positions of each row whose logits exist at once; 0 means all. Where the length of rows
        is cut over the mesh, each device has its share of them, from its own positions.
    """

    def add(total, pieces):
        rows, rest = pieces
        value, _, kept = term(head_logits(rows, head), rest, whole)
        return total + value, kept

    pieces = split((hidden, parts), chunk)
    total, kept = jax.lax.scan(add, jnp.zeros((), jnp.float32), pieces)
    return total, join(kept, hidden.shape[1])


def _forward(term, hidden, head, parts, whole, chunk):
    def add(carry, pieces):
        total, d_head = carry
        rows, rest = pieces
        value, d_logits, kept = term(head_logits(rows, head), rest, whole)
        d_rows, more = through_head(rows, head, d_logits)
        return (total + value, d_head + more), (d_rows, kept)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    pieces = split((hidden, parts), chunk)
    (total, d_head), (d_rows, kept) = jax.lax.scan(add, start, pieces)
    saved = (join(d_rows, hidden.shape[1]), d_head.astype(head.dtype))
    return (total, join(kept, hidden.shape[1])), saved


def _backward(term, chunk, saved, cotangents):
    del term, chunk
    scale = cotangents[0]  # what is kept is for metrics and has no gradient
    d_hidden, d_head = (gradient * scale.astype(gradient.dtype) for gradient in saved)
    return d_hidden, d_head, None, None


sum_over_chunks.defvjp(_forward, _backward)


def split(arrays: Tree, chunk: int) -> Tree:
    """Arrays (B, S, ...) cut along S into (chunks, B, c, ...); the last chunk is padded with zeros.

    A chunk has as many positions of every part that a row's length is cut into over the mesh, so
    that none of them travels.

    Args:
      arrays: any tree of them.
      chunk: positions in a chunk; 0 means all.
    """
    rows, length = jax.tree.leaves(arrays)[0].shape[:2]
    parts = parts_of_length(length)
    size = min(-(-chunk // parts) or length // parts, length // parts)
    padding = -(length // parts) % size

    def cut(array):
        rest = array.shape[2:]
        array = array.reshape(rows, parts, -1, *rest)
        array = jnp.pad(array, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * len(rest))
        pieces = jnp.moveaxis(array.reshape(rows, parts, -1, size, *rest), 2, 0)
        return pieces.reshape(len(pieces), rows, parts * size, *rest)

    return jax.tree.map(cut, arrays)


def join(pieces: Tree, length: int) -> Tree:
    """Chunks, stacked in front, end to end again and without the padding."""
    parts = parts_of_length(length)

    def glue(pieces):
        count, rows, _, *rest = pieces.shape
        pieces = pieces.reshape(count, rows, parts, -1, *rest)
        pieces = jnp.moveaxis(pieces, 0, 2).reshape(rows, parts, -1, *rest)
        return pieces[:, :, : length // parts].reshape(rows, length, *rest)

    return jax.tree.map(glue, pieces)


def head_logits(hidden: Float[Array, "B c D"], head: Float[Array, "D V"]) -> Float[Array, "B c V"]:
    """Logits in float32; the product runs in the hidden states' type."""
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def through_head(
    hidden: Float[Array, "B c D"], head: Float[Array, "D V"], d_logits: Float[Array, "B c V"]
) -> tuple[Float[Array, "B c D"], Float[Array, "D V"]]:
    """Gradients of the hidden states, in their type, and of the head, in float32."""
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.matmul(d_logits, head.astype(hidden.dtype).T)
    d_head = jnp.einsum("bcd,bcv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return d_hidden, d_head


def one_hot(targets: Array, vocabulary: int) -> Array:
    """(B, c, V) booleans: True at the target."""
    return jnp.arange(vocabulary)[None, None, :] == targets[..., None]


def pick(values: Float[Array, "B c V"], targets: Array) -> Float[Array, "B c"]:
    """The target's value at each position."""
    return jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]
