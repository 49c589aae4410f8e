"""GPT-3 175B: FLOPs of its paper, and the energy that others reckoned from a measured rate."""

from moejax.cost.counts import count
from moejax.cost.published.figures import Bill, Figure, train_flops
from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig

PAPER, ENERGY = "arXiv 2005.14165, table D.1", "arXiv 2104.10350, table 4"
TOKENS, LENGTH = 300e9, 2048
GPUS, DAYS, RATE = 10_000, 14.8, 24.6e12  # V100s, and what one of them measured
KILOWATTS, PUE, KG_PER_KWH = 0.33, 1.10, 0.429
# Its feed-forward has two matrices of width 4 D: as many parameters as three of width 8 D / 3.
MODEL = ModelConfig(
    50257, 12288, 96, 8 * 12288 // 3, attention=AttentionConfig(96, 96, 128), tie_embeddings=True
)


def bill() -> Bill:
    """The bill of the training, as far as anybody published it."""
    flops = TOKENS * train_flops(MODEL, LENGTH, "6N")
    energy = GPUS * DAYS * 24 * KILOWATTS * PUE / 1e3
    return Bill(
        "gpt3",
        "GPT-3 175B, dense",
        ("arXiv 2005.14165", "arXiv 2104.10350"),
        ("300B tokens in rows of 2,048", "10,000 V100 at 24.6 TFLOP/s, 330 W, PUE 1.10"),
        (
            Figure("parameters", "", 174.6e9, count(MODEL, 1).params.total, "derived",
                   "counted from its shape", PAPER),
            Figure("training FLOPs", "FLOP", 3.14e23, flops, "derived", "6 x 174.6B x 300B", PAPER),
            Figure("days", "days", DAYS, flops / RATE / 3600 / 24 / GPUS, "derived",
                   "FLOPs at 24.6 TFLOP/s on 10,000 GPUs", ENERGY),
            Figure("energy", "MWh", 1287, energy, "echoed",
                   "14.8 days x 10,000 GPUs x 330 W x 1.10", ENERGY),
            Figure("emissions", "t CO2", 552.1, 1287 * KG_PER_KWH, "echoed",
                   "1,287 MWh x 0.429 kg/kWh", ENERGY),
        ),
    )  # fmt: skip
