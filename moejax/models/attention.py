"""Grouped-query attention with rotary embeddings, for whole rows and for cached decoding."""

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.models.attend import attend
from moejax.models.layers import DType, Linear, RMSNorm
from moejax.models.model_config import ModelConfig
from moejax.models.ring import Place, appends, attend_cached, slot_positions, write
from moejax.models.rope import frequencies, rotate


@struct.dataclass
class Masks:
    """What queries may see, by kind of layer; each broadcastable to (B, H, S, keys).

    Attributes:
      full: of a layer that sees all earlier positions; None if there is none.
      window: of a layer that sees the last ``attention.window`` only; None if there is none.
      place: with a cache, where the queries' own keys go in it.
    """

    full: Bool[Array, "..."] | None
    window: Bool[Array, "..."] | None = None
    place: Place | None = None


@struct.dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, with room for more.

    Which slots are filled the whole cache knows, and the mask says; see ``moejax.models.ring``.

    Attributes:
      key: rotated keys; of a layer with a window, those of the last M positions.
      value: values.
    """

    key: Float[Array, "*layers B N M d"]
    value: Float[Array, "*layers B N M d"]

    @classmethod
    def empty(
        cls, config: ModelConfig, layers: int, batch: int, length: int, dtype: DType
    ) -> "KeyValueCache":
        """Room for ``length`` positions of ``batch`` rows in each of ``layers`` layers."""
        shape = (layers, batch, config.attention.kv_heads, length, config.head_dim)
        empty = jnp.zeros(shape, dtype)
        return cls(empty, empty)

    @property
    def length(self) -> int:
        """Positions that it has room for, M."""
        return self.key.shape[-2]


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
    seen = cached_mask(jnp.zeros(1, jnp.int32), length, length, window)
    if segment_ids is None:
        return seen
    return seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def cached_mask(
    start: Int[Array, " B"], length: int, reach: int, window: int = 0
) -> Bool[Array, "B 1 S M"]:
    """As ``attention_mask``, for ``length`` queries from position ``start`` on over M cached keys.

    Args:
      start: position of each row's first query.
      length: S.
      reach: positions that the cache has room for, M; position p stands in slot p.
      window: positions that a query sees, its own included; 0 means all.
    """
    key = jnp.arange(reach)[None, None, None, :]
    query = (start[:, None] + jnp.arange(length)[None])[:, None, :, None]
    seen = key <= query
    return seen & (key > query - window) if window else seen


def ring_mask(
    start: Int[Array, " B"], at: Int[Array, "B S"], room: int, window: int
) -> Bool[Array, "B 1 S M"] | Bool[Array, "B 1 S R"]:
    """What the queries of a layer with a window see of a ring: with several, their own keys after
    the ring's slots; with one, its key in the ring.

    Args:
      start: position of each row's first query.
      at: ``Place.at``.
      room: slots of the ring, M.
      window: positions that a query sees, its own included.
    """
    query = start[:, None] + jnp.arange(at.shape[1])[None]
    if appends(window, at.shape[1]):
        key = jnp.concatenate([slot_positions(start - 1, room), at], axis=1)
    else:
        key = slot_positions(start, room)
    key, query = key[:, None, None, :], query[:, None, :, None]
    return (key >= 0) & (key <= query) & (key > query - window)


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
        place: Place | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValueCache | None]:
        """Attends; with a cache, writes this call's keys and values into it.

        Args:
          x: normalised layer input.
          positions: position of each token in its document.
          mask: what each query may see, broadcastable to (B, H, S, keys); without a cache,
            ``attention_mask``'s, which lets no query see a later key.
          cache: where earlier keys and values stand.
          place: with a cache, where this call's stand.

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
        if cache is None or place.whole:
            mixed = attend(
                query, key, value, mask, name=options.implementation, sinks=self._sinks(),
                window=self.window,
            )  # fmt: skip
        if cache is not None:
            old = cache
            cache = KeyValueCache(write(old.key, key, place), write(old.value, value, place))
            if not place.whole:
                seen = (cache.key, cache.value)
                if appends(self.window, x.shape[1]):
                    beside = lambda old, new: jnp.concatenate([old, new.swapaxes(1, 2)], axis=2)
                    seen = (beside(old.key, key), beside(old.value, value))
                seen = (array.astype(x.dtype) for array in seen)
                mixed = attend_cached(query, *seen, mask, self._sinks())
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
