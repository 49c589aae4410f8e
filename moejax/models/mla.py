"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads are made of one latent a token, and one key that turns is shared by
all heads. Whole rows are attended with keys and values made of the latents; with a cache, which
holds latents and shared keys only, the matrix that would make them is applied to queries and
outputs instead (section 2.1.2), so that all heads attend to the one latent. Where the length of
rows is cut over the mesh, latents and shared keys are gathered and every device makes the keys and
values of all positions: of DeepSeek-V3, 576 numbers a token travel in place of 40,960.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.models.attend import attend, attend_on_device
from moejax.models.context import attend_from_here, is_cut
from moejax.models.layers import DType, Linear, RMSNorm, kernel_init, linear
from moejax.models.model_config import ModelConfig
from moejax.models.ring import Place, write
from moejax.models.rope import frequencies, rotate
from moejax.numerics import Precision


@struct.dataclass
class LatentCache:
    """What is kept of the positions seen so far, with room for more.

    Attributes:
      entry: the normalised latent (first ``kv_lora_rank`` channels) and the turned shared key, in
        one array since a query multiplies with both at once.
    """

    entry: Float[Array, "*layers B M w"]

    @classmethod
    def empty(
        cls, config: ModelConfig, layers: int, batch: int, length: int, dtype: DType
    ) -> "LatentCache":
        """Room for ``length`` positions of ``batch`` rows in each of ``layers`` layers."""
        width = config.attention.kv_lora_rank + config.attention.rope_head_dim
        return cls(jnp.zeros((layers, batch, length, width), dtype))

    @property
    def length(self) -> int:
        """Positions that it has room for, M."""
        return self.entry.shape[-2]


class KeyValueUp(nn.Module):
    """The matrix from the latent to the heads' keys (first ``nope`` channels) and values.

    Attributes:
      heads: H.
      nope: channels of a key that do not turn.
      width: channels of a value.
      latent: width of the latent, r.
      init_std: deviation of the initial kernel; 0 scales by fan-in.
      precision: of the product with whole rows; absorbed, for cached decoding, it is ``native``.
    """

    heads: int
    nope: int
    width: int
    latent: int
    init_std: float = 0.0
    precision: Precision = "native"

    def setup(self) -> None:
        init = nn.with_logical_partitioning(
            kernel_init(self.init_std, 1, 3), ("latent", "heads", "head_dim")
        )
        shape = (self.latent, self.heads, self.nope + self.width)
        self.kernel = self.param("kernel", init, shape, jnp.float32)

    def __call__(
        self, latent: Float[Array, "B S r"]
    ) -> tuple[Float[Array, "B S H n"], Float[Array, "B S H v"]]:
        """Keys and values of every head."""
        return self.made(latent, self.kernel)

    def made(self, latent: Float[Array, "B S r"], kernel: Float[Array, "r H w"]):
        """As a call, by some heads' part of the kernel."""
        both = linear(latent, kernel, 1, self.precision)
        return both[..., : self.nope], both[..., self.nope :]

    def absorb_query(self, query: Float[Array, "B S H n"]) -> Float[Array, "B S H r"]:
        """What multiplies with a latent as the query does with the key made of it."""
        kernel = self.kernel[..., : self.nope].astype(query.dtype)
        return jnp.einsum("bshn,rhn->bshr", query, kernel)

    def values(self, mixed: Float[Array, "B S H r"]) -> Float[Array, "B S H v"]:
        """The mixed values, from mixed latents."""
        kernel = self.kernel[..., self.nope :].astype(mixed.dtype)
        return jnp.einsum("bshr,rhv->bshv", mixed, kernel)


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention whose keys and values are made of a latent."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "..."],
        cache: LatentCache | None = None,
        place: Place | None = None,
    ) -> tuple[Float[Array, "B S D"], LatentCache | None]:
        """Attends; with a cache, writes this call's latents and shared keys into it.

        Args:
          x: normalised layer input.
          positions: position of each token in its document.
          mask: what each query may see, broadcastable to (B, H, S, keys); without a cache,
            ``attention_mask``'s, which lets no query see a later key.
          cache: where earlier latents and shared keys stand.
          place: with a cache, where this call's stand.

        Returns:
          The output and the cache after the call (None without one).
        """
        config, options = self.config, self.config.attention
        std, biased, rank = config.init_std, options.bias == "all", options.kv_lora_rank
        precision = config.precision
        turning = frequencies(options.rope_theta, options.rope_head_dim, options.rope)
        turn = lambda part: rotate(part, positions, turning, options.rope.cos_sin_factor)
        query = self._query(x)
        still, turned = jnp.split(query, [options.nope_head_dim], axis=-1)
        turned = turn(turned)
        down = Linear(
            (rank + options.rope_head_dim,), ("embed", None), 1, std, biased, precision,
            name="kv_down",
        )(x)  # fmt: skip
        latent = RMSNorm(options.latent_norm_eps, name="kv_norm")(down[..., :rank])
        shared = turn(down[..., None, rank:])
        up = KeyValueUp(
            options.num_heads, options.nope_head_dim, options.v_head_dim, rank, std, precision,
            name="kv_up",
        )  # fmt: skip
        scale = config.head_dim**-0.5 * options.rope.softmax_factor
        whole = cache is None or place.whole
        if cache is not None:
            entry = jnp.concatenate([latent, shared[:, :, 0]], -1)
            cache = LatentCache(write(cache.entry, entry, place))
        if whole:
            query = jnp.concatenate([still, turned], -1)
            mixed = self._attend(query, up, latent, shared, mask, scale)
        else:
            # One key/value head. A copy of the latents would cost more than to mix the shared keys
            # too; heads of this width are beyond cuDNN's.
            entries = cache.entry[:, :, None].astype(x.dtype)
            query = jnp.concatenate([up.absorb_query(still), turned], -1)
            mixed = attend(query, entries, entries, mask, name="xla", scale=scale, whole=False)
            mixed = up.values(mixed[..., :rank])
        axes = ("heads", "head_dim", "embed")
        out = Linear((x.shape[-1],), axes, 2, std, biased, precision, name="out")
        return out(mixed), cache

    def _attend(self, query, up, latent, shared, mask, scale):
        """Over whole rows, with the keys and values that latents make."""
        name = self.config.attention.implementation

        def keys_and_values(latent, shared, kernel):
            key, value = up.made(latent, kernel)
            shared = jnp.broadcast_to(shared, (*key.shape[:3], shared.shape[-1]))
            return jnp.concatenate([key, shared], -1), value

        # FP8's blocks of the kernel are those of all heads, which one device has not.
        if not is_cut(query.shape[1]) or self.config.precision == "fp8":
            key, value = keys_and_values(latent, shared, up.kernel)
            return attend(query, key, value, mask, name=name, scale=scale)

        def run(query, mask, latent, shared, kernel):
            key, value = keys_and_values(latent, shared, kernel)
            return attend_on_device(query, key, value, mask, name=name, scale=scale)

        by_row = (latent, (None,)), (shared, (None, None))
        return attend_from_here(run, query, mask, by_row, ((up.kernel, (None, "tensor", None)),))

    def _query(self, x: Float[Array, "B S D"]) -> Float[Array, "B S H d"]:
        """Queries, by a matrix of low rank with a norm between, or by a full one."""
        config, options = self.config, self.config.attention
        std, heads = config.init_std, (options.num_heads, config.head_dim)
        if not options.q_lora_rank:
            axes = ("embed", "heads", "head_dim")
            return Linear(heads, axes, 1, std, precision=config.precision, name="query")(x)
        down = Linear(
            (options.q_lora_rank,), ("embed", None), 1, std, options.bias == "all",
            config.precision, name="query_down",
        )(x)  # fmt: skip
        down = RMSNorm(options.latent_norm_eps, name="query_norm")(down)
        axes = ("latent", "heads", "head_dim")
        return Linear(heads, axes, 1, std, precision=config.precision, name="query_up")(down)
