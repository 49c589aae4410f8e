"""What decoding keeps of the positions so far, and what each new position sees of them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.models.attention import KeyValueCache, Masks, attention_mask, cached_mask
from moejax.models.layers import compute_dtype
from moejax.models.mla import LatentCache
from moejax.models.model_config import ModelConfig

Caches = dict[str, Any]


def init_cache(config: ModelConfig, batch: int, max_length: int, mtp: bool = False) -> Caches:
    """An empty cache for ``batch`` rows of up to ``max_length`` positions.

    With ``mtp`` the MTP modules have theirs in it, for ``Transformer.draft``.
    """
    dtype = compute_dtype(config.dtype)
    kind = LatentCache if config.attention.kind == "mla" else KeyValueCache
    cache: Caches = {"index": jnp.zeros((), jnp.int32)}
    for i, (kinds, repeats) in enumerate(config.layout):
        layer = lambda n=repeats: kind.empty(config, n, batch, max_length, dtype)
        cache[f"segment_{i}"] = {f"layer_{j}": layer() for j in range(len(kinds))}
    for k in range(config.mtp_depth if mtp else 0):
        cache[f"mtp_{k}"] = jnp.zeros((), jnp.int32)
        cache[f"mtp_{k}_layer"] = {"layer_0": kind.empty(config, 1, batch, max_length, dtype)}
    return cache


def make_masks(
    config: ModelConfig, segment_ids: Int[Array, "B S"] | None, length: int, cache: Caches | None
) -> Masks:
    """The masks of all kinds of layers for ``length`` tokens a row, after those in a cache."""
    if cache is None:
        mask = lambda window: attention_mask(segment_ids, length, window)
    else:
        reach = cache["segment_0"]["layer_0"].length
        mask = lambda window: cached_mask(cache["index"], length, reach, window)
    windowed = config.layers("window") > 0
    return Masks(mask(0), mask(config.attention.window) if windowed else None)
