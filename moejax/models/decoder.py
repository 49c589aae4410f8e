"""The decoder's layers: attention, then a dense or an MoE feed-forward; and their scan."""

from typing import Any

import flax.linen as nn
import jax
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.models.attention import GroupedQueryAttention, KeyValueCache, Masks
from moejax.models.layers import RMSNorm
from moejax.models.mla import LatentCache, MultiHeadLatentAttention
from moejax.models.model_config import ModelConfig, has_window, is_moe
from moejax.moe.experts import SwiGLU
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs

Stats = dict[str, Any]
LayerCache = KeyValueCache | LatentCache
# Collections whose leaves have a leading axis of a segment's repeats.
STACKED = (
    "params", "router_state", "router_batch", "router_choice", "router_replay", "intermediates",
)  # fmt: skip


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
            return attention(x, positions, masks.full, cache, masks.place)
        window = config.attention.window if has_window(self.kind) else 0
        mask = masks.window if window else masks.full
        attention = GroupedQueryAttention(config, window, name="attention")
        return attention(x, positions, mask, cache, masks.place)


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


def scanned(config: ModelConfig, kinds: tuple[str, ...], repeats: int, name: str) -> nn.Module:
    """Layers of these kinds, repeated: their leaves have a leading axis of the repeats."""
    body = Pattern
    if config.remat != "none":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = dots if config.remat == "dots" else jax.checkpoint_policies.nothing_saveable
        body = nn.remat(Pattern, policy=policy, prevent_cse=False)
    scan = nn.scan(
        body,
        variable_axes=dict.fromkeys(STACKED, 0),
        split_rngs={"params": True, "router": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=repeats,
        unroll=config.unroll or repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scan(config, kinds, name=name)
