"""Causal attention in blocks of queries for a CPU: no score above the diagonal, none saved.

A block of queries multiplies with the keys up to its own end only, so that about half of the
products and exponentials are left out. Saved for the backward pass are the inputs, the output and
each row's log-sum-exp; probabilities are computed again, and the row sums of the softmax's
gradient come from the output (FlashAttention-2, arXiv 2307.08691, section 2.3.1). On a CPU, writing
fresh memory costs more than that: probabilities saved over layers are most of what attention takes.
"""

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


@jax.custom_vjp
def causal_attention(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B S N d"],
    value: Float[Array, "B S N d"],
    mask: Bool[Array, "#B 1 S S"],
) -> Float[Array, "B S H d"]:
    """softmax(query · key / sqrt(d)) · value, where ``mask`` lets a query see no later key.

    Products run in the inputs' type, sums and the softmax in float32.

    Args:
      query: queries; head h uses key/value head h // (H / N).
      key: keys.
      value: values.
      mask: True where a query (third axis) sees a key (last). False above the diagonal, which is
        not read throughout, and True somewhere in every row.

    Returns:
      The mixed values, in the queries' type.
    """
    return _forward(query, key, value, mask)[0]


def _group(x: Float[Array, "B S H w"], kv_heads: int) -> Float[Array, "B N G S w"]:
    """Heads in front, as the G query heads of each key/value head."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _ungroup(x: Float[Array, "B N G S w"]) -> Float[Array, "B S H w"]:
    batch, kv_heads, group, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)


def _einsum(equation: str, *arrays: Array) -> Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _scores(
    query: Float[Array, "B N G t d"], key: Float[Array, "B N s d"], mask: Bool[Array, "#B 1 t s"]
) -> Float[Array, "B N G t s"]:
    """Scaled scores in float32; where a key is not seen, so low that it does not count."""
    scores = _einsum("bngtd,bnsd->bngts", query, key) * query.shape[-1] ** -0.5
    return jnp.where(mask[:, :, None], scores, 0.7 * jnp.finfo(jnp.float32).min)


def _forward(query, key, value, mask):
    grouped, keys = _group(query, key.shape[2]), key.swapaxes(1, 2)
    values = value.swapaxes(1, 2)
    outs, log_totals = [], []
    for start, end in block_ranges(query.shape[1]):
        scores = _scores(grouped[..., start:end, :], keys[:, :, :end], mask[:, :, start:end, :end])
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = _einsum("bngts,bnsd->bngtd", weights.astype(value.dtype), values[:, :, :end])
        outs.append((mixed / total).astype(query.dtype))
        log_totals.append(largest + jnp.log(total))
    out = _ungroup(jnp.concatenate(outs, axis=3))
    return out, (query, key, value, mask, out, jnp.concatenate(log_totals, axis=3))


def _backward(saved, d_out):
    query, key, value, mask, out, log_total = saved
    dtype, kv_heads = query.dtype, key.shape[2]
    # Row sums of probability times its gradient, from d numbers a row and not S.
    row_sum = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    row_sum, d_out = _group(row_sum, kv_heads), _group(d_out, kv_heads)
    query, key, value = _group(query, kv_heads), key.swapaxes(1, 2), value.swapaxes(1, 2)
    d_query, d_key, d_value = [], None, None
    # The last block reaches every key; the others add to the front of its gradients.
    for start, end in reversed(block_ranges(query.shape[3])):
        rows = (slice(None),) * 3 + (slice(start, end),)
        seen = (slice(None),) * 2 + (slice(end),)
        scores = _scores(query[rows], key[seen], mask[:, :, start:end, :end])
        weights = jnp.exp(scores - log_total[rows])
        d_weights = _einsum("bngtd,bnsd->bngts", d_out[rows], value[seen])
        d_scores = weights * (d_weights - row_sum[rows]) * query.shape[-1] ** -0.5
        weights, d_scores = weights.astype(dtype), d_scores.astype(dtype)
        d_query.append(_einsum("bngts,bnsd->bngtd", d_scores, key[seen]).astype(dtype))
        to_key = _einsum("bngts,bngtd->bnsd", d_scores, query[rows])
        to_value = _einsum("bngts,bngtd->bnsd", weights, d_out[rows])
        d_key = to_key if d_key is None else d_key.at[seen].add(to_key)
        d_value = to_value if d_value is None else d_value.at[seen].add(to_value)
    whole = lambda gradient, like: gradient.astype(like.dtype).swapaxes(1, 2)
    d_query = _ungroup(jnp.concatenate(d_query[::-1], axis=3))
    return d_query, whole(d_key, key), whole(d_value, value), None


causal_attention.defvjp(_forward, _backward)
