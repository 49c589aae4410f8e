"""The decoder-only transformer: dense and MoE layers, scanned segment by segment."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.models.attention import (
    GroupedQueryAttention,
    KeyValueCache,
    Masks,
    attention_mask,
    cached_mask,
)
from moejax.models.layers import RMSNorm, compute_dtype
from moejax.models.loss import chunked_cross_entropy
from moejax.models.mla import LatentCache, MultiHeadLatentAttention
from moejax.models.model_config import ModelConfig, has_window, is_moe
from moejax.moe.experts import SwiGLU
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs

Stats = dict[str, Any]
Caches = dict[str, Any]
LayerCache = KeyValueCache | LatentCache


@struct.dataclass
class Output:
    """What a forward pass gives.

    Attributes:
      logits: scores of the next token; None from ``Transformer.encode``.
      hidden: final, normalised hidden states.
      aux_loss: weighted auxiliary losses, summed over MoE layers: add it to the loss.
      router_stats: sums over tokens, by segment and layer; leaves have a leading axis of repeats.
      cache: what attention keeps, after the call, if a cache was given.
    """

    logits: Float[Array, "B S V"] | None
    hidden: Float[Array, "B S D"]
    aux_loss: Float[Array, ""]
    router_stats: Stats
    cache: Caches | None


@struct.dataclass
class LossOutput:
    """Sum of negative log-likelihoods (nats), targets counted, and the routers' losses and sums."""

    nll: Float[Array, ""]
    targets: Float[Array, ""]
    aux_loss: Float[Array, ""]
    router_stats: Stats


@struct.dataclass
class Carry:
    """What goes from layer to layer.

    Attributes:
      x: the residual stream.
      aux_loss: weighted auxiliary losses so far.
      layer: MoE layers so far.
      logits: the last router's scores, zeros before the first; only for routers that read them.
    """

    x: Float[Array, "B S D"]
    aux_loss: Float[Array, ""]
    layer: Int[Array, ""]
    logits: Float[Array, "B S N"] | None


class Layer(nn.Module):
    """One pre-norm layer: attention, then a dense SwiGLU or an MoE layer."""

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        tokens: RouterInputs,
        masks: Masks,
        cache: LayerCache | None,
    ) -> tuple[Carry, Stats, LayerCache | None]:
        config, x = self.config, carry.x
        norm = lambda name: RMSNorm(config.norm_eps, name=name)
        inner = norm("attention_norm")(x)
        mixed, cache = self._attention(inner, tokens.positions, masks, cache)
        x = nn.with_logical_constraint(x + mixed, ("batch", "length", "embed_act"))
        inner, stats = norm("ffn_norm")(x), {}
        if is_moe(self.kind):
            out = MoELayer(config.moe, config.init_std, config.precision, name="moe")(
                tokens.replace(x=inner, layer=carry.layer, previous_logits=carry.logits)
            )
            y, stats = out.y, out.stats
            carry = carry.replace(aux_loss=carry.aux_loss + out.aux_loss, layer=carry.layer + 1)
            if carry.logits is not None:
                carry = carry.replace(logits=out.logits)
        else:
            ffn = SwiGLU(config.dense_width, config.init_std, config.precision, name="ffn")
            y = ffn(inner)
        x = nn.with_logical_constraint(x + y, ("batch", "length", "embed_act"))
        return carry.replace(x=x), stats, cache

    def _attention(self, x, positions, masks, cache):
        """By the kind that the config names, under the mask of this layer."""
        config = self.config
        if config.attention.kind == "mla":
            attention = MultiHeadLatentAttention(config, name="attention")
            return attention(x, positions, masks.full, cache)
        window = config.attention.window if has_window(self.kind) else 0
        mask = masks.window if window else masks.full
        attention = GroupedQueryAttention(config, window, name="attention")
        return attention(x, positions, mask, cache)


class Pattern(nn.Module):
    """The layers that a segment repeats: the body of its scan."""

    config: ModelConfig
    kinds: tuple[str, ...]

    @nn.compact
    def __call__(self, carry, caches, tokens, masks):
        stats, new_caches = {}, {}
        for i, kind in enumerate(self.kinds):
            name = f"layer_{i}"
            layer = Layer(self.config, kind, name=name)
            cache = None if caches is None else caches[name]
            carry, layer_stats, cache = layer(carry, tokens, masks, cache)
            if layer_stats:
                stats[name] = layer_stats
            new_caches[name] = cache
        return carry, (stats, None if caches is None else new_caches)


def _scanned(config: ModelConfig, kinds: tuple[str, ...], repeats: int, name: str) -> nn.Module:
    body = Pattern
    if config.remat != "none":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = dots if config.remat == "dots" else jax.checkpoint_policies.nothing_saveable
        body = nn.remat(Pattern, policy=policy, prevent_cse=False)
    scan = nn.scan(
        body,
        variable_axes={"params": 0, "router_state": 0, "router_batch": 0, "intermediates": 0},
        split_rngs={"params": True, "router": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scan(config, kinds, name=name)


class Transformer(nn.Module):
    """A decoder-only transformer.

    Parameters stand under ``embedding``, ``segment_i/layer_j/{attention_norm, attention, ffn_norm,
    ffn | moe}`` (each leaf with a leading axis of the segment's repeats), ``final_norm`` and, where
    it is not tied, ``head``. Routers with state keep it under the same path in the collection
    ``router_state``.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        std = config.init_std or config.d_model**-0.5
        init = nn.with_logical_partitioning(nn.initializers.normal(std), ("vocab", "embed"))
        shape = (config.vocab_size, config.d_model)
        self.embedding = self.param("embedding", init, shape, jnp.float32)
        for i, (kinds, repeats) in enumerate(config.layout):
            setattr(self, f"segment_{i}", _scanned(config, kinds, repeats, f"segment_{i}"))
        self.final_norm = RMSNorm(config.norm_eps)
        if not config.tie_embeddings:
            init = nn.with_logical_partitioning(nn.initializers.normal(std), ("embed", "vocab"))
            self.head = self.param("head", init, shape[::-1], jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        cache: Caches | None = None,
        train: bool = False,
    ) -> Output:
        """Next-token logits of every position, in float32.

        Args:
          tokens: token ids.
          segment_ids: document of each token in a packed row, 0 for padding; None means one
            document a row.
          positions: position of each token in its document; None counts from 0, or from the
            cache's length.
          cache: from ``init_cache``, or an earlier call's; then rows hold one document each and
            ``segment_ids`` must be None.
          train: routers may draw noise, from the rng stream ``router``, and make the choices that
            are for training only; False has them route as in use.
        """
        output = self.encode(tokens, segment_ids, positions, cache, train)
        kernel = self._head().astype(output.hidden.dtype)
        logits = jnp.matmul(output.hidden, kernel, preferred_element_type=jnp.float32)
        return output.replace(logits=logits)

    def encode(self, tokens, segment_ids=None, positions=None, cache=None, train=False) -> Output:
        """As ``__call__``, without the logits."""
        batch, length = tokens.shape
        start = jnp.zeros((), jnp.int32) if cache is None else cache["index"]
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(length)[None], (batch, length))
        masks = make_masks(self.config, segment_ids, length, cache)
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        x = jnp.take(self.embedding, tokens, axis=0).astype(compute_dtype(self.config.dtype))
        x = x * jnp.asarray(self.config.embedding_multiplier, x.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        inputs = RouterInputs(None, valid, tokens, positions, segment_ids, train=train)
        carry, stats = self._carry(x), {}
        new_cache = None if cache is None else {**cache, "index": start + length}
        for i in range(len(self.config.layout)):
            name = f"segment_{i}"
            caches = None if cache is None else cache[name]
            carry, (segment_stats, caches) = getattr(self, name)(carry, caches, inputs, masks)
            if segment_stats:
                stats[name] = segment_stats
            if cache is not None:
                new_cache[name] = caches
        return Output(None, self.final_norm(carry.x), carry.aux_loss, stats, new_cache)

    def _carry(self, x: Float[Array, "B S D"]) -> Carry:
        """What the first layer starts from."""
        moe, logits = self.config.moe, None
        if moe is not None and moe.router.carries_logits:
            choices = moe.router.num_choices(moe.num_experts)
            logits = jnp.zeros((*x.shape[:2], choices), jnp.float32)
        return Carry(x, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), logits)

    def loss(
        self,
        tokens: Int[Array, "B S"],
        targets: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        train: bool = False,
    ) -> LossOutput:
        """Summed cross-entropy over the tokens that are not padding, never building the logits.

        The chunks are ``model.loss_chunk`` positions of every row; ``train`` as in ``__call__``.
        """
        output = self.encode(tokens, segment_ids, positions, train=train)
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        weights = valid.astype(jnp.float32)
        nll = chunked_cross_entropy(
            output.hidden, self._head(), targets, weights, self.config.loss_chunk
        )
        return LossOutput(nll, jnp.sum(weights), output.aux_loss, output.router_stats)

    def _head(self) -> Float[Array, "D V"]:
        return self.embedding.T if self.config.tie_embeddings else self.head


def init_cache(config: ModelConfig, batch: int, max_length: int) -> Caches:
    """An empty cache for ``batch`` rows of up to ``max_length`` positions."""
    dtype = compute_dtype(config.dtype)
    kind = LatentCache if config.attention.kind == "mla" else KeyValueCache
    cache: Caches = {"index": jnp.zeros((), jnp.int32)}
    for i, (kinds, repeats) in enumerate(config.layout):
        layer = lambda n=repeats: kind.empty(config, n, batch, max_length, dtype)
        cache[f"segment_{i}"] = {f"layer_{j}": layer() for j in range(len(kinds))}
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


def update_router_state(config: ModelConfig, router_state: Stats, router_stats: Stats) -> Stats:
    """Applies every router's ``update`` once, to statistics summed over the whole batch.

    Args:
      config: the model's config.
      router_state: the collection ``router_state``; empty where no router keeps state.
      router_stats: ``Output.router_stats``, summed over micro-batches and devices.

    Returns:
      The new collection, of the same structure.
    """
    if not router_state:
        return router_state
    router = MoELayer.make_router(config.moe, config.init_std, parent=None)
    update = lambda state, stats: {"moe": {"router": router.update(state["moe"]["router"], stats)}}
    return {
        segment: {
            layer: update(state, router_stats[segment][layer]) for layer, state in layers.items()
        }
        for segment, layers in router_state.items()
    }
