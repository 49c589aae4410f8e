"""Grouped-query attention with rotary embeddings, for whole rows and for cached decoding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.models.attend import attend
from moejax.models.layers import DType, Linear, RMSNorm
from moejax.models.model_config import ModelConfig
from moejax.models.rope import frequencies, rotate


@struct.dataclass
class Masks:
    """What queries may see, by kind of layer; each broadcastable to (B, H, S, keys).

    Attributes:
      full: of a layer that sees all earlier positions.
      window: of a layer that sees the last ``attention.window`` only; None if there is none.
    """

    full: Bool[Array, "..."]
    window: Bool[Array, "..."] | None = None


@struct.dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, with room for more.

    Attributes:
      key: rotated keys; positions from ``index`` on are not yet filled.
      value: values.
      index: positions filled, the same for every row.
    """

    key: Float[Array, "*layers B M N d"]
    value: Float[Array, "*layers B M N d"]
    index: Int[Array, "*layers"]

    @classmethod
    def empty(
        cls, config: ModelConfig, layers: int, batch: int, length: int, dtype: DType
    ) -> "KeyValueCache":
        """Room for ``length`` positions of ``batch`` rows in each of ``layers`` layers."""
        shape = (layers, batch, length, config.attention.kv_heads, config.head_dim)
        empty = jnp.zeros(shape, dtype)
        return cls(empty, empty, jnp.zeros(layers, jnp.int32))

    @property
    def length(self) -> int:
        """Positions that it has room for, M."""
        return self.key.shape[-3]


def attention_mask(
    segment_ids: Int[Array, "B S"] | None, length: int, window: int = 0
) -> Bool[Array, "B 1 S S"] | Bool[Array, "1 1 S S"]:
    """True where a query (third axis) sees a key (last): not later, and of the same document.

    Padding (segment 0) sees padding only, so that no row of the softmax is empty.

    Args:
      segment_ids: document of each token; None means one a row.
      length: S.
      window: positions that a query sees, its own included; 0 means all.
    """
    seen = cached_mask(jnp.zeros((), jnp.int32), length, length, window)
    if segment_ids is None:
        return seen
    return seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def cached_mask(
    start: Int[Array, ""], length: int, reach: int, window: int = 0
) -> Bool[Array, "1 1 S M"]:
    """As ``attention_mask``, for ``length`` queries from position ``start`` on over M cached keys.

    Args:
      start: position of the first query.
      length: S.
      reach: positions that the cache has room for, M.
      window: positions that a query sees, its own included; 0 means all.
    """
    key = jnp.arange(reach)[None, None, None, :]
    query = (start + jnp.arange(length))[None, None, :, None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def write(old: Float[Array, "B M *w"], new: Float[Array, "B S *w"], index: Int[Array, ""]) -> Array:
    """A cache's array with S positions more, from ``index`` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with H query heads over N key/value heads (arXiv 2305.13245).

    Attributes:
      config: the model's config.
      window: positions that a query sees, its own included; 0 means all. The mask says the same.
    """

    config: ModelConfig
    window: int = 0

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
        width, biased = config.head_dim, options.bias != "none"
        heads = lambda name, count, axis: Linear(
            (count, width), ("embed", axis, "head_dim"), 1, config.init_std, biased,
            config.precision, name=name,
        )(x)  # fmt: skip
        query = self._place(heads("query", options.num_heads, "heads"), "query_norm", positions)
        key = self._place(heads("key", options.kv_heads, "kv_heads"), "key_norm", positions)
        value = heads("value", options.kv_heads, "kv_heads")
        whole = cache is None
        if cache is not None:
            cache = KeyValueCache(
                write(cache.key, key, cache.index),
                write(cache.value, value, cache.index),
                cache.index + x.shape[1],
            )
            key, value = cache.key.astype(x.dtype), cache.value.astype(x.dtype)
        mixed = attend(
            query, key, value, mask, name=options.implementation, sinks=self._sinks(),
            window=self.window, whole=whole,
        )  # fmt: skip
        axes = ("heads", "head_dim", "embed")
        out = Linear(
            (x.shape[-1],), axes, 2, config.init_std, options.bias == "all", config.precision,
            name="out",
        )  # fmt: skip
        return out(mixed), cache

    def _place(
        self, x: Float[Array, "B S H d"], norm: str, positions: Int[Array, "B S"]
    ) -> Float[Array, "B S H d"]:
        """Queries or keys, normalised where the config says so, then turned."""
        config, options = self.config, self.config.attention
        if options.qk_norm != "none":
            flat = x if options.qk_norm == "head" else x.reshape(*x.shape[:2], -1)
            x = RMSNorm(config.norm_eps, name=norm)(flat).reshape(x.shape)
        turning = frequencies(options.rope_theta, options.rotary_dim(x.shape[-1]), options.rope)
        return rotate(x, positions, turning, options.rope.cos_sin_factor)

    def _sinks(self) -> Float[Array, " H"] | None:
        options = self.config.attention
        if not options.sinks:
            return None
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
        return self.param("sinks", init, (options.num_heads,), jnp.float32)
