"""Causal attention in blocks of queries for a CPU: no score above the diagonal, none saved.

A block of queries multiplies with the keys up to its own end only, so that about half of the
products and exponentials are left out. Saved for the backward pass are the inputs, the output and
each row's log-sum-exp; probabilities are computed again, and the row sums of the softmax's
gradient come from the output (FlashAttention-2, arXiv 2307.08691, section 2.3.1). On a CPU, writing
fresh memory costs more than that: probabilities saved over layers are most of what attention takes.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Large enough for the products, small enough to skip most of what is above the diagonal.
SMALLEST_BLOCK = 64
# The loop over blocks is unrolled: more of them take longer to compile.
MOST_BLOCKS = 8


def block_ranges(length: int) -> list[tuple[int, int]]:
    """Start and end of each block of queries.

    Measured forward and backward on two CPU cores: at S 128 and 256 blocks of 32 or 128 are slower
    than 64 or within the noise, at S 1024 those of 128 are a little faster than 64. A loop over
    rows with such blocks inside is slower at S 128 and 256, and no faster at S 1024.
    """
    size = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def causal_attention(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B M N d"],
    value: Float[Array, "B M N v"],
    mask: Bool[Array, "#B 1 S M"],
    sinks: Float[Array, " H"] | None = None,
    scale: float | None = None,
    window: int = 0,
) -> Float[Array, "B S H v"]:
    """softmax(scale · query · key) · value, where ``mask`` lets a query see no later key.

    Products run in the inputs' type, sums and the softmax in float32. Where there are more keys
    than queries, these are some of a row's, from a position on that only the mask says: then every
    block multiplies with all keys.

    Args:
      query: queries; head h uses key/value head h // (H / N).
      key: keys.
      value: values.
      mask: True where a query (third axis) sees a key (last), and that somewhere in every row. For
        as many keys as queries False above the diagonal, which is not read throughout.
      sinks: a logit a head that takes part in the softmax and has no value (gpt-oss).
      scale: factor on the scores; None means 1 / sqrt(d).
      window: positions that the mask lets a query see at most, its own included: for as many
        keys as queries, those before are not read. 0 means all.

    Returns:
      The mixed values, in the queries' type.
    """
    return _forward(query, key, value, mask, sinks, scale, window)[0]


def _group(x: Float[Array, "B S H w"], kv_heads: int) -> Float[Array, "B N G S w"]:
    """Heads in front, as the G query heads of each key/value head."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _ungroup(x: Float[Array, "B N G S w"]) -> Float[Array, "B S H w"]:
    batch, kv_heads, group, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)


def _einsum(equation: str, *arrays: Array) -> Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _blocks(length: int, keys: int, window: int) -> list[tuple[int, int, int, int]]:
    """Start and end of each block of queries, the first key that it sees and the end of them."""
    ranges = block_ranges(length)
    if keys != length:
        return [(start, end, 0, keys) for start, end in ranges]
    first = lambda start: max(0, start - window + 1) if window else 0
    return [(start, end, first(start), end) for start, end in ranges]


def _scores(
    query: Float[Array, "B N G t d"],
    key: Float[Array, "B N s d"],
    mask: Bool[Array, "#B 1 t s"],
    scale: float | None,
) -> Float[Array, "B N G t s"]:
    """Scaled scores in float32; where a key is not seen, so low that it does not count."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _einsum("bngtd,bnsd->bngts", query, key) * scale
    return jnp.where(mask[:, :, None], scores, 0.7 * jnp.finfo(jnp.float32).min)


def _sink_logits(sinks: Float[Array, " H"], kv_heads: int) -> Float[Array, "1 N G 1 1"]:
    return sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)


def _forward(query, key, value, mask, sinks, scale, window):
    grouped, keys = _group(query, key.shape[2]), key.swapaxes(1, 2)
    values = value.swapaxes(1, 2)
    outs, log_totals = [], []
    for start, end, first, last in _blocks(query.shape[1], key.shape[1], window):
        seen = (slice(None),) * 2 + (slice(first, last),)
        block = mask[:, :, start:end, first:last]
        scores = _scores(grouped[..., start:end, :], keys[seen], block, scale)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            largest = jnp.maximum(largest, _sink_logits(sinks, key.shape[2]))
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total += jnp.exp(_sink_logits(sinks, key.shape[2]) - largest)
        mixed = _einsum("bngts,bnsd->bngtd", weights.astype(value.dtype), values[seen])
        outs.append((mixed / total).astype(query.dtype))
        log_totals.append(largest + jnp.log(total))
    out = _ungroup(jnp.concatenate(outs, axis=3))
    return out, (query, key, value, mask, sinks, out, jnp.concatenate(log_totals, axis=3))


def _backward(scale, window, saved, d_out):
    query, key, value, mask, sinks, out, log_total = saved
    dtype, kv_heads = query.dtype, key.shape[2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    # Row sums of probability times its gradient, from v numbers a row and not S.
    row_sum = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    row_sum, d_out = _group(row_sum, kv_heads), _group(d_out, kv_heads)
    query, key, value = _group(query, kv_heads), key.swapaxes(1, 2), value.swapaxes(1, 2)
    d_query, d_key, d_value = [], None, None
    # The last block reaches the last key; the others add to what lies before.
    for start, end, first, last in reversed(_blocks(query.shape[3], key.shape[2], window)):
        rows = (slice(None),) * 3 + (slice(start, end),)
        seen = (slice(None),) * 2 + (slice(first, last),)
        scores = _scores(query[rows], key[seen], mask[:, :, start:end, first:last], scale)
        weights = jnp.exp(scores - log_total[rows])
        d_weights = _einsum("bngtd,bnsd->bngts", d_out[rows], value[seen])
        d_scores = weights * (d_weights - row_sum[rows]) * factor
        weights, d_scores = weights.astype(dtype), d_scores.astype(dtype)
        d_query.append(_einsum("bngts,bnsd->bngtd", d_scores, key[seen]).astype(dtype))
        to_key = _einsum("bngts,bngtd->bnsd", d_scores, query[rows])
        to_value = _einsum("bngts,bngtd->bnsd", weights, d_out[rows])
        d_key, d_value = _add(d_key, to_key, seen), _add(d_value, to_value, seen)
    whole = lambda gradient, like: gradient.astype(like.dtype).swapaxes(1, 2)
    d_query = _ungroup(jnp.concatenate(d_query[::-1], axis=3))
    d_sinks = None
    if sinks is not None:
        # The sink's probability times minus the row sum: its own value is zero.
        taken = -jnp.exp(_sink_logits(sinks, kv_heads) - log_total) * row_sum
        d_sinks = jnp.sum(taken, axis=(0, 3, 4)).reshape(-1).astype(sinks.dtype)
    return d_query, whole(d_key, key), whole(d_value, value), None, d_sinks


def _add(total: Array | None, part: Array, where: tuple[slice, ...]) -> Array:
    """Adds a block's part to a gradient over all keys; the first part reaches the last key."""
    if total is None:
        return jnp.pad(part, ((0, 0), (0, 0), (where[2].start, 0), (0, 0)))
    return total.at[where].add(part)


causal_attention.defvjp(_forward, _backward)
