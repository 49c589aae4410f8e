"""Grouped-query attention with rotary embeddings, for whole rows and for cached decoding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.models.causal_attention import causal_attention
from moejax.models.layers import Linear
from moejax.models.model_config import ModelConfig
from moejax.models.rope import rotate


@struct.dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, with room for more.

    Attributes:
      key: rotated keys; positions from ``index`` on are not yet filled.
      value: values.
      index: positions filled, the same for every row.
    """

    key: Float[Array, "B M N d"]
    value: Float[Array, "B M N d"]
    index: Int[Array, ""]


def attention_mask(
    segment_ids: Int[Array, "B S"] | None, length: int
) -> Bool[Array, "B 1 S S"] | Bool[Array, "1 1 S S"]:
    """True where a query (third axis) sees a key (last): not later, and of the same document.

    Padding (segment 0) sees padding only, so that no row of the softmax is empty.
    """
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segment_ids is None:
        return causal
    return causal & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with H query heads over N key/value heads (arXiv 2305.13245)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "..."],
        cache: KeyValueCache | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValueCache | None]:
        """Attends; with a cache, writes this call's keys and values into it first.

        Args:
          x: normalised layer input.
          positions: position of each token in its document.
          mask: what each query may see, broadcastable to (B, H, S, keys); without a cache,
            ``attention_mask``'s, which lets no query see a later key.
          cache: where earlier keys and values stand.

        Returns:
          The output and the cache after the call (None without one).
        """
        config, options = self.config, self.config.attention
        std, width = config.init_std, config.head_dim
        heads = lambda name, count, axis: Linear(
            (count, width), ("embed", axis, "head_dim"), init_std=std, name=name
        )(x)
        query = rotate(heads("query", options.num_heads, "heads"), positions, options.rope_theta)
        key = rotate(heads("key", options.kv_heads, "kv_heads"), positions, options.rope_theta)
        value = heads("value", options.kv_heads, "kv_heads")
        if cache is not None:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), cache.index, axis=1
            )
            cache = KeyValueCache(
                write(cache.key, key), write(cache.value, value), cache.index + x.shape[1]
            )
            key, value = cache.key.astype(x.dtype), cache.value.astype(x.dtype)
        name = implementation(options.implementation, query)
        if name == "xla" and cache is None and jax.default_backend() == "cpu":
            mixed = causal_attention(query, key, value, mask)
        else:
            mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=name)
        out = Linear((x.shape[-1],), ("heads", "head_dim", "embed"), 2, std, name="out")(mixed)
        return out, cache


def implementation(name: str, query: Array) -> str:
    """Resolves ``auto``: cuDNN on a GPU, where its kernels take the type and width of the heads.

    Args:
      name: ``auto``, ``xla`` or ``cudnn``.
      query: queries, (B, S, H, d).
    """
    if name != "auto":
        return name
    width = query.shape[-1]
    fits = query.dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128
    return "cudnn" if jax.default_backend() == "gpu" and fits else "xla"
