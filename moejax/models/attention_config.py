"""Options of attention (block ``model.attention``) and of its rotary embedding."""

import dataclasses
import math
from typing import Literal

from moejax.config import check, check_not_negative, check_positive


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Options of the rotary position embedding (block ``model.attention.rope``).

    Attributes:
      fraction: share of a head's channels that turn, the first ones (partial rotary embedding).
      scaling: how frequencies are stretched for contexts longer than those of pre-training:
        ``linear`` divides them all, ``llama3`` the low ones, ``yarn`` (arXiv 2309.00071, section
        3.2) ramps between the two by the turns that a channel makes in ``original_length``.
      factor: how many times longer the context is, s.
      original_length: positions of pre-training's context.
      beta_fast: turns from which ``yarn`` leaves a channel as it is.
      beta_slow: turns up to which ``yarn`` divides a channel's frequency by the factor.
      truncate: whether ``yarn`` rounds the ends of its ramp to whole channels.
      mscale: with ``yarn``, cosine and sine are multiplied by m(mscale) / m(mscale_all_dim), where
        m(a) = 0.1 · a · ln s + 1.
      mscale_all_dim: with ``yarn``, the softmax scale of MLA is multiplied by m(mscale_all_dim)²
        (DeepSeek); 0 leaves it.
      attention_factor: factor on cosine and sine instead of that of ``mscale``; 0 means that one.
      low_frequency_factor: ``llama3``: wavelengths above original_length / this are divided.
      high_frequency_factor: ``llama3``: wavelengths below original_length / this stay.
    """

    fraction: float = 1.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        where = "model.attention.rope"
        check_positive(where, self, "beta_fast", "beta_slow", "low_frequency_factor")
        check_not_negative(
            where, self, "original_length", "mscale", "mscale_all_dim", "attention_factor"
        )
        check(
            0 < self.fraction <= 1, f"{where}.fraction", self.fraction, "must be above 0, up to 1"
        )
        check(self.factor >= 1, f"{where}.factor", self.factor, "must be at least 1")
        check(
            self.scaling not in ("llama3", "yarn") or self.original_length > 0,
            f"{where}.original_length", self.original_length,
            f"has to be set for scaling {self.scaling}: the positions of pre-training's context",
        )  # fmt: skip
        check(
            self.beta_fast >= self.beta_slow, f"{where}.beta_fast", self.beta_fast,
            f"is below {where}.beta_slow = {self.beta_slow}; choose at least that",
        )  # fmt: skip
        check(
            self.high_frequency_factor > self.low_frequency_factor,
            f"{where}.high_frequency_factor", self.high_frequency_factor,
            f"must be above {where}.low_frequency_factor = {self.low_frequency_factor}",
        )  # fmt: skip

    @property
    def cos_sin_factor(self) -> float:
        """Factor on cosine and sine, and so on queries and keys."""
        if self.scaling != "yarn":
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor on the softmax scale of MLA."""
        return self._m(self.mscale_all_dim) ** 2 if self.scaling == "yarn" else 1.0

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Options of attention (block ``model.attention``).

    Attributes:
      num_heads: query heads, H.
      num_kv_heads: key/value heads of ``gqa``, N; 0 means as many as query heads.
      head_dim: width of a head of ``gqa``; 0 means d_model / num_heads.
      kind: ``gqa``, grouped-query attention (arXiv 2305.13245), or ``mla``, multi-head latent
        attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
      q_lora_rank: ``mla``: rank of the queries' projection; 0 means one full matrix.
      kv_lora_rank: ``mla``: width of the latent that keys and values are made of.
      nope_head_dim: ``mla``: channels of a query or key without position.
      rope_head_dim: ``mla``: channels that turn; the key's are shared by all heads.
      v_head_dim: ``mla``: width of a value head.
      latent_norm_eps: ``mla``: epsilon of the norms of the two latents.
      qk_norm: RMSNorm of queries and keys before they turn: ``head`` of each head (Qwen3), ``all``
        over all heads at once (OLMoE).
      bias: biases of the projections: ``qkv`` (Qwen2), or ``all``, the output's too. ``mla`` has
        none on its up-projections.
      window: positions that a query of a ``..._window`` layer sees, its own included.
      sinks: a learned logit a head in the softmax's denominator (gpt-oss).
      rope_theta: base of the rotary position embedding.
      rope: its other options.
      implementation: ``auto`` is cuDNN on a GPU in bfloat16, for heads of up to 128 channels and
        without sinks, and XLA elsewhere; XLA on a CPU runs ``moejax.models.causal_attention``,
        elsewhere ``jax.nn.dot_product_attention``. Decoding with the cache of ``mla`` is always
        XLA's: its one key/value head is wider than cuDNN's.
    """

    num_heads: int = 8
    num_kv_heads: int = 0
    head_dim: int = 0
    kind: Literal["gqa", "mla"] = "gqa"
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    nope_head_dim: int = 0
    rope_head_dim: int = 0
    v_head_dim: int = 0
    latent_norm_eps: float = 1e-6
    qk_norm: Literal["none", "head", "all"] = "none"
    bias: Literal["none", "qkv", "all"] = "none"
    window: int = 0
    sinks: bool = False
    rope_theta: float = 10_000.0
    rope: RopeConfig = RopeConfig()
    implementation: Literal["auto", "xla", "cudnn"] = "auto"

    def __post_init__(self) -> None:
        where = "model.attention"
        check_positive(where, self, "num_heads", "rope_theta", "latent_norm_eps")
        check_not_negative(
            where, self, "num_kv_heads", "head_dim", "q_lora_rank", "kv_lora_rank",
            "nope_head_dim", "rope_head_dim", "v_head_dim", "window",
        )  # fmt: skip
        check(
            self.num_heads % self.kv_heads == 0,
            f"{where}.num_kv_heads", self.num_kv_heads,
            f"does not divide {where}.num_heads = {self.num_heads}; choose a divisor",
        )  # fmt: skip
        check(
            not (self.sinks and self.implementation == "cudnn"), f"{where}.implementation", "cudnn",
            f"has no {where}.sinks; use 'xla' or 'auto'",
        )  # fmt: skip
        if self.kind == "mla":
            self._check_mla()
        else:
            self._check_gqa()

    def _check_gqa(self) -> None:
        where = "model.attention"
        for name in ("q_lora_rank", "kv_lora_rank", "nope_head_dim", "rope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            check(not value, f"{where}.{name}", value, f"is of kind mla only; set {where}.kind")
        check(
            self.rotary_dim(self.head_dim) % 2 == 0, f"{where}.head_dim", self.head_dim,
            "leaves an odd number of channels to turn, but rotary embeddings turn pairs; choose an "
            "even width",
        )  # fmt: skip

    def _check_mla(self) -> None:
        where = "model.attention"
        check_positive(where, self, "kv_lora_rank", "nope_head_dim", "rope_head_dim", "v_head_dim")
        check(
            self.rope_head_dim % 2 == 0, f"{where}.rope_head_dim", self.rope_head_dim,
            "is odd, but rotary embeddings turn pairs; choose an even width",
        )  # fmt: skip
        for name, idle in (("head_dim", 0), ("num_kv_heads", 0), ("qk_norm", "none"),
                           ("sinks", False), ("window", 0)):  # fmt: skip
            value = getattr(self, name)
            check(
                value == idle, f"{where}.{name}", value,
                f"does not apply to kind mla; leave it {idle!r}",
            )  # fmt: skip
        fraction = self.rope.fraction
        check(
            fraction == 1, f"{where}.rope.fraction", fraction,
            "does not apply to kind mla, whose rope_head_dim says what turns; leave it 1",
        )  # fmt: skip

    @property
    def kv_heads(self) -> int:
        """Key/value heads, the default resolved."""
        return self.num_kv_heads or self.num_heads

    def rotary_dim(self, head_dim: int) -> int:
        """Channels of a ``gqa`` head that turn."""
        return int(head_dim * self.rope.fraction)
