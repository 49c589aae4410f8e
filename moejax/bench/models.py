"""Whole models to measure: OLMoE's shape at several sizes, by name or spelled out."""

import dataclasses
from typing import Any

from moejax.bench.shapes import parse_sizes
from moejax.config import check_positive
from moejax.cost import counts
from moejax.models import AttentionConfig, ModelConfig
from moejax.moe import MoEConfig
from moejax.moe.routers import RouterOptions


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model and its batch. Every layer is an MoE layer, the embeddings are not tied.

    Attributes:
      name: short name, or the shape spelled out.
      D: width.
      L: layers.
      H: attention heads.
      E: experts.
      K: experts that a token runs through.
      F: hidden width of one expert.
      V: vocabulary.
      B: rows of a batch.
      S: positions of a row.
      needs_gpu: whether it is left out by default where there is no GPU; its layers are then not
        run by a loop, for which they would be copied.
      moments_dtype: type of AdamW's moments.
    """

    name: str
    D: int
    L: int
    H: int
    E: int
    K: int
    F: int
    V: int
    B: int
    S: int
    needs_gpu: bool = False
    moments_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_positive("--shapes", self, *AXES)

    @property
    def sizes(self) -> dict[str, int]:
        """All axes, and T = B · S."""
        return {axis: getattr(self, axis) for axis in AXES} | {"T": self.tokens}

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.B * self.S

    @property
    def loss_chunk(self) -> int:
        """Positions of each row whose logits exist at once: a power of two that keeps them below
        128 Mi numbers; 0, all of them, where that is enough."""
        if self.tokens * self.V <= 2**27:
            return 0
        return 1 << (max(1, 2**27 // (self.B * self.V)).bit_length() - 1)

    def config(self, dtype: str, dispatch: str, router: RouterOptions) -> ModelConfig:
        """The MoE model."""
        moe = MoEConfig(
            num_experts=self.E, top_k=self.K, d_expert=self.F, dispatch=dispatch, router=router
        )
        return dataclasses.replace(self._base(dtype), moe=moe)

    def dense_config(self, dtype: str) -> ModelConfig:
        """The same model with a dense SwiGLU of width K · F in every layer: equal active FLOPs,
        but for the routers'."""
        return dataclasses.replace(self._base(dtype), d_ff=self.K * self.F)

    def _base(self, dtype: str) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.V, d_model=self.D, num_layers=self.L, dtype=dtype,
            attention=AttentionConfig(num_heads=self.H), tie_embeddings=False, norm_eps=1e-5,
            init_std=0.02, loss_chunk=self.loss_chunk, unroll=0 if self.needs_gpu else 1,
        )  # fmt: skip


AXES = tuple("DLHEKFVBS")

MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        #           name           D    L   H   E  K   F    V     B   S
        ModelShape("olmoe_tiny", 256, 8, 4, 32, 4, 128, 4096, 8, 256),
        # About 150M, 500M and 1B active parameters, head included. The last has half of OLMoE's
        # experts: with 64 its optimizer state alone would fill a card of 80 GB.
        ModelShape("olmoe_150m", 768, 12, 12, 64, 8, 384, 50304, 16, 2048, needs_gpu=True),
        ModelShape("olmoe_500m", 1280, 16, 10, 64, 8, 640, 50304, 8, 2048, needs_gpu=True),
        ModelShape(
            "olmoe_1b",
            2048,
            14,
            16,
            32,
            8,
            1024,
            50304,
            16,
            2048,
            needs_gpu=True,
            moments_dtype="bfloat16",
        ),
    )
}


def find_model(name: str) -> ModelShape:
    """A model by its name, or spelled out as ``D256-L8-H4-E32-K4-F128-V4096-B8-S256``.

    Raises:
      UserError: neither a known name nor a model.
    """
    if name in MODELS:
        return MODELS[name]
    return ModelShape(name, **parse_sizes(name, dict.fromkeys(AXES), MODELS))


def describe(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """Parameters held and active (head included), and training FLOPs of a token."""
    counted = counts.count(config, seq_len)
    return {
        "params": counted.params.total,
        "active_params": counted.params.active.with_head,
        "train_flops_per_token": counted.flops_per_token.train,
    }
