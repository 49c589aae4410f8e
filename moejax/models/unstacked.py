"""A model's layers one by one, for a loop that runs all of them many times.

A scan over layers slices its weights and its cache out of the stacks, and writes the cache back:
copies, that cost a training step little and a decoding step most of its time. Here the stacks are
cut once, before the loop.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.models.cache import Caches
from moejax.models.model_config import ModelConfig

Tree = Any


def unstacked_config(config: ModelConfig) -> ModelConfig:
    """The same model with a segment for each layer."""
    segments = tuple(((kind,), 1) for _, _, _, kind in _layers(config))
    return dataclasses.replace(config, segments=segments)


def _layers(config: ModelConfig):
    """Segment, place in its pattern, repeat and kind of each layer, first to last."""
    for i, (kinds, repeats) in enumerate(config.layout):
        for r in range(repeats):
            for j, kind in enumerate(kinds):
                yield f"segment_{i}", f"layer_{j}", r, kind


def _cut(config: ModelConfig, tree: dict[str, Tree]) -> dict[str, Tree]:
    """A tree by segment and layer, cut; what is no segment stays."""
    cut = {name: part for name, part in tree.items() if not name.startswith("segment_")}
    for n, (segment, layer, r, _) in enumerate(_layers(config)):
        if layer in tree.get(segment, {}):
            one = jax.tree.map(lambda leaf, r=r: leaf[r : r + 1], tree[segment][layer])
            cut[f"segment_{n}"] = {"layer_0": one}
    return cut


def unstack(config: ModelConfig, variables: dict[str, Tree]) -> dict[str, Tree]:
    """Variables of ``unstacked_config``."""
    return {name: _cut(config, collection) for name, collection in variables.items()}


def unstack_cache(config: ModelConfig, cache: Caches) -> Caches:
    """A cache of ``unstacked_config``."""
    return _cut(config, cache)


def stack(config: ModelConfig, tree: dict[str, Tree]) -> dict[str, Tree]:
    """The way back, for a tree by segment and layer of ``unstacked_config``."""
    parts: dict[str, dict[str, list]] = {}
    for n, (segment, layer, _, _) in enumerate(_layers(config)):
        if f"segment_{n}" in tree:
            parts.setdefault(segment, {}).setdefault(layer, []).append(tree[f"segment_{n}"])
    join = lambda *leaves: jnp.concatenate(leaves, axis=0)
    return {
        segment: {
            layer: jax.tree.map(join, *(one["layer_0"] for one in ones))
            for layer, ones in layers.items()
        }
        for segment, layers in parts.items()
    }
