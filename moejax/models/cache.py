"""What decoding keeps of the positions so far, and what each new position sees of them."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.models.attention import KeyValueCache, Masks, attention_mask, cached_mask, ring_mask
from moejax.models.layers import compute_dtype
from moejax.models.mla import LatentCache
from moejax.models.model_config import ModelConfig, has_window
from moejax.models.ring import Place

Caches = dict[str, Any]


def init_cache(
    config: ModelConfig, batch: int, max_length: int, mtp: bool = False, ahead: int = 0
) -> Caches:
    """An empty cache for ``batch`` rows of up to ``max_length`` positions, each at its own.

    ``index`` is how many positions of each row it holds. Layers with a window have room for that
    many positions only. What a row's last call wrote can be taken back by lowering its index.

    Args:
      config: the model's config.
      batch: rows, B.
      max_length: positions of a row at most.
      mtp: the MTP modules have theirs in it, for ``Transformer.draft``.
      ahead: positions at most that are taken back at once.
    """
    dtype = compute_dtype(config.dtype)
    latent = config.attention.kind == "mla"
    kind = LatentCache if latent else KeyValueCache
    ring = min(max_length, config.attention.window + ahead)

    def layer(name: str, layers: int):
        room = ring if has_window(name) and not latent else max_length
        return kind.empty(config, layers, batch, room, dtype)

    index = jnp.zeros(batch, jnp.int32)
    cache: Caches = {"index": index}
    for i, (kinds, repeats) in enumerate(config.layout):
        cache[f"segment_{i}"] = {f"layer_{j}": layer(k, repeats) for j, k in enumerate(kinds)}
    for k in range(config.mtp_depth if mtp else 0):
        cache[f"mtp_{k}"] = index
        cache[f"mtp_{k}_layer"] = {"layer_0": layer(config.mtp_kind, 1)}
    return cache


def make_masks(config: ModelConfig, segment_ids: Int[Array, "B S"] | None, length: int) -> Masks:
    """The masks of all kinds of layers for whole rows of ``length`` tokens."""
    mask = lambda window: attention_mask(segment_ids, length, window)
    windowed = config.layers("window") > 0
    return Masks(mask(0), mask(config.attention.window) if windowed else None)


def cached_masks(
    config: ModelConfig,
    layers: Iterable[tuple[str, KeyValueCache | LatentCache]],
    start: Int[Array, " B"],
    valid: Bool[Array, "B S"],
    fresh: bool,
) -> Masks:
    """The masks of tokens after those in a cache, and where they go in it.

    Args:
      config: the model's config.
      layers: kind and cache of each layer.
      start: positions that the cache holds of each row.
      valid: False for padding, which stands behind all else and is not kept.
      fresh: the cache is an empty one, and attention is over the tokens themselves.
    """
    length = valid.shape[1]
    at = jnp.where(valid, start[:, None] + jnp.arange(length)[None], -1)
    if fresh:
        masks = make_masks(config, valid.astype(jnp.int32), length)
        return masks.replace(place=Place(at, whole=True))
    masks = Masks(None, None, Place(at))
    for kind, cache in layers:
        # Latent attention has no windows.
        if has_window(kind) and isinstance(cache, KeyValueCache):
            if masks.window is None:
                seen = ring_mask(start, at, cache.length, config.attention.window)
                masks = masks.replace(window=seen)
        elif masks.full is None:
            masks = masks.replace(full=cached_mask(start, length, cache.length))
    return masks


def layer_caches(config: ModelConfig, cache: Caches):
    """Kind and cache of each of the main model's layers, those of a scan as one."""
    for i, (kinds, _) in enumerate(config.layout):
        for j, kind in enumerate(kinds):
            yield kind, cache[f"segment_{i}"][f"layer_{j}"]
