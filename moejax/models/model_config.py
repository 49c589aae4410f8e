"""Options of a transformer (block ``model`` of a config), with its MoE layers' inside."""

import dataclasses
from typing import Literal

from moejax.config import check, check_not_negative, check_positive, nearest
from moejax.models.attention_config import AttentionConfig
from moejax.moe.moe_config import MoEConfig
from moejax.numerics import Precision

# A layer's kind names its feed-forward, and whether its attention has a window.
LAYER_KINDS = ("dense", "moe", "dense_window", "moe_window")

# Beyond any model; what loops over layers or modules would not end in time.
MOST_LAYERS, MOST_MTP = 10_000, 100

Segment = tuple[tuple[str, ...], int]


def is_moe(kind: str) -> bool:
    """Whether a kind of layer has experts."""
    return "moe" in kind.split("_")


def has_window(kind: str) -> bool:
    """Whether the attention of a kind of layer sees a window only."""
    return "window" in kind.split("_")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Options of a decoder-only transformer.

    Attributes:
      vocab_size: token ids, V; at least the tokenizer's.
      d_model: width, D.
      num_layers: layers, L.
      d_ff: width of the dense layers' SwiGLU; 0 means the active width of an MoE layer,
        (top_k + num_shared_experts) · d_expert, or 4 · d_model without MoE.
      first_k_dense: dense layers before the MoE layers; without ``moe`` every layer is dense.
      segments: layers spelled out instead, as (kinds of layer, repeats): ``((("dense",), 1),
        (("dense", "moe"), 13))`` is one dense layer, then dense and MoE by turns. The attention of
        a ``dense_window`` or ``moe_window`` layer sees ``attention.window`` positions.
      mtp_depth: multi-token-prediction modules, each predicting one token further (DeepSeek-V3,
        arXiv 2412.19437, section 2.2).
      attention: options of attention.
      tie_embeddings: the head is the embedding's transpose.
      embedding_multiplier: factor on the embeddings as the layers see them; a tied embedding,
        small for the head's sake, wants about the square root of d_model.
      norm_eps: epsilon of RMSNorm.
      dtype: compute type; ``auto`` is float32 on a CPU and bfloat16 elsewhere. Parameters, the
        router, norms, logits and the loss are float32 always.
      precision: of the products of linear maps: those of attention, dense layers and experts,
        shared and routed. ``native`` is ``dtype``'s; ``fp8`` simulates DeepSeek-V3's recipe (arXiv
        2412.19437, section 3.3) in float32, on any platform: for the study of its error, and
        slower than ``native``. See ``moejax.numerics.fp8``. Embedding, head, router, norms and
        attention itself stay as they are.
      remat: what the backward pass recomputes: ``none``, ``dots`` (all but the outputs of matrix
        products) or ``full`` (every layer).
      unroll: layers of a segment in one turn of its loop; 0 means all, without a loop. More of them
        take longer to compile, and on a GPU save copies of weights and activations.
      loss_chunk: positions of each row whose logits exist at once in the loss; 0 means all.
      init_std: deviation of the initial weights; 0 means scaled by fan-in.
      moe: options of the MoE layers; None makes a dense model.
    """

    vocab_size: int
    d_model: int = 256
    num_layers: int = 4
    d_ff: int = 0
    first_k_dense: int = 0
    segments: tuple[Segment, ...] = ()
    mtp_depth: int = 0
    attention: AttentionConfig = AttentionConfig()
    tie_embeddings: bool = True
    embedding_multiplier: float = 1.0
    norm_eps: float = 1e-6
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    precision: Precision = "native"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: int = 1
    loss_chunk: int = 0
    init_std: float = 0.0
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        check_positive(
            "model", self, "vocab_size", "d_model", "num_layers", "norm_eps", "embedding_multiplier"
        )
        check_not_negative(
            "model",
            self,
            "d_ff",
            "first_k_dense",
            "unroll",
            "loss_chunk",
            "init_std",
            "mtp_depth",
        )
        for name, most in (("num_layers", MOST_LAYERS), ("mtp_depth", MOST_MTP)):
            value = getattr(self, name)
            check(value <= most, f"model.{name}", value, f"must be at most {most}")
        heads = self.attention.num_heads
        check(
            self.attention.kind == "mla"
            or self.attention.head_dim > 0
            or self.d_model % heads == 0,
            "model.attention.num_heads", heads,
            f"does not divide model.d_model = {self.d_model}; choose a divisor, or set "
            "model.attention.head_dim",
        )  # fmt: skip
        check(
            self.attention.kind == "mla" or self.attention.rotary_dim(self.head_dim) % 2 == 0,
            "model.attention.head_dim", self.head_dim,
            "leaves an odd number of channels to turn, but rotary embeddings turn pairs; choose "
            "heads of an even width",
        )  # fmt: skip
        self._check_segments()

    def _check_segments(self) -> None:
        for kinds, repeats in self.segments:
            for kind in kinds:
                check(
                    kind in LAYER_KINDS, "model.segments", kind,
                    f"no such kind of layer; {nearest(kind, LAYER_KINDS)}",
                )  # fmt: skip
            check(
                bool(kinds) and repeats > 0, "model.segments", (kinds, repeats),
                "needs at least one kind of layer, repeated at least once",
            )  # fmt: skip
        layers = sum(len(kinds) * repeats for kinds, repeats in self.segments)
        check(
            not self.segments or layers == self.num_layers, "model.segments", self.segments,
            f"holds {layers} layers, but model.num_layers = {self.num_layers}; make them agree",
        )  # fmt: skip
        check(
            self.moe is not None or not self.layers("moe"),
            "model.segments", self.segments,
            "has MoE layers, but the config has no block moe; add one",
        )  # fmt: skip
        check(
            self.attention.window > 0 or not self.layers("window"),
            "model.attention.window", self.attention.window,
            "has to be set, since model.segments has layers with a window",
        )  # fmt: skip
        weights = getattr(self.moe and self.moe.router, "layer_weights", ())
        check(
            not weights or len(weights) == self.layers("moe"), "router.layer_weights", weights,
            f"has {len(weights)} weights for {self.layers('moe')} MoE layers; give one each",
        )  # fmt: skip
        check(
            self.first_k_dense <= self.num_layers, "model.first_k_dense", self.first_k_dense,
            f"is above model.num_layers = {self.num_layers}; choose at most that many",
        )  # fmt: skip

    @property
    def layout(self) -> tuple[Segment, ...]:
        """The segments that the model is built of: given, or from ``first_k_dense``."""
        if self.segments:
            return self.segments
        dense = self.num_layers if self.moe is None else self.first_k_dense
        parts = ((("dense",), dense), (("moe",), self.num_layers - dense))
        return tuple(part for part in parts if part[1])

    @property
    def head_dim(self) -> int:
        """Width of a query or key head, the default resolved."""
        if self.attention.kind == "mla":
            return self.attention.nope_head_dim + self.attention.rope_head_dim
        return self.attention.head_dim or self.d_model // self.attention.num_heads

    @property
    def dense_width(self) -> int:
        """Width of the dense layers' SwiGLU, the default resolved."""
        if self.d_ff:
            return self.d_ff
        if self.moe is None:
            return 4 * self.d_model
        return (self.moe.top_k + self.moe.num_shared_experts) * self.moe.d_expert

    @property
    def mtp_kind(self) -> str:
        """Kind of the layer of every MTP module: that of the model's last layer."""
        return self.layout[-1][0][-1]

    def layers(self, kind: str) -> int:
        """How many layers are ``dense`` or ``moe``, or have a ``window``; without MTP modules."""
        return sum(
            sum(kind in layer.split("_") for layer in kinds) * repeats
            for kinds, repeats in self.layout
        )
