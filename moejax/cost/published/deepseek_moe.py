"""DeepSeekMoE 16B beside LLaMA2 7B: FLOPs of 4,096 tokens, forward and backward."""

from moejax.cost.counts import count
from moejax.cost.published.figures import Bill, Figure, train_flops
from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig
from moejax.models.presets import PRESETS

PAPER = "arXiv 2401.06066, section 5"
LENGTH = 4096
LLAMA2_7B = ModelConfig(
    32000, 4096, 32, 11008, attention=AttentionConfig(32, 32, 128), tie_embeddings=False
)


def bill() -> Bill:
    """The paper's comparison; it publishes no hours."""
    model = PRESETS["deepseek_moe_16b"]
    params = count(model, LENGTH).params
    moe, dense = (
        LENGTH * train_flops(c, LENGTH, "full_attention") / 1e12 for c in (model, LLAMA2_7B)
    )
    config = "counted from its config"
    why = "the paper does not say how it counts; full attention with the head comes closest"
    how = "full attention, with head"
    return Bill(
        "deepseek_moe",
        "DeepSeekMoE 16B, 2.8B a token",
        ("arXiv 2401.06066",),
        ("sequences of 4,096",),
        (
            Figure("parameters", "", 16.4e9, params.total, "derived", config, PAPER, 0.005),
            Figure("active parameters", "", 2.8e9, params.active.with_embeddings, "derived",
                   f"{config}, with both embeddings", PAPER, 0.02),
            Figure("TFLOP of 4K tokens", "TFLOP", 74.4, moe, "derived", how, PAPER, 0.025, why),
            Figure("TFLOP of 4K tokens, LLaMA2 7B", "TFLOP", 187.9, dense, "derived", how, PAPER,
                   0.025, why),
            Figure("share of LLaMA2 7B's FLOPs", "%", 39.6, 100 * moe / dense, "derived",
                   "the first over the second", PAPER, 0.03, why),
        ),
    )  # fmt: skip
