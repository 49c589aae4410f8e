"""Llama 2 70B: A100 hours and emissions."""

from moejax.cost.counts import count
from moejax.cost.published.figures import Bill, Figure, implied_mfu, train_flops
from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig

TABLE = "arXiv 2307.09288, table 2"
TOKENS, LENGTH, HOURS, KILOWATTS = 2e12, 4096, 1_720_320, 0.4
# Of the 7B in the same table: hours and tonnes.
HOURS_7B, TONNES_7B = 184_320, 31.22
MODEL = ModelConfig(
    32000, 8192, 80, 28672, attention=AttentionConfig(64, 8, 128), tie_embeddings=False
)


def bill() -> Bill:
    """The bill of pre-training; the paper gives no dollars."""
    factor = TONNES_7B * 1e3 / (HOURS_7B * KILOWATTS)
    flops = TOKENS * train_flops(MODEL, LENGTH)
    return Bill(
        "llama2_70b",
        "Llama 2 70B, dense",
        ("arXiv 2307.09288",),
        ("2T tokens in rows of 4,096", "1,720,320 A100 hours at 400 W"),
        (
            Figure("parameters", "", 70e9, count(MODEL, 1).params.total, "derived",
                   "counted from its config", TABLE, 0.02),
            Figure("emissions", "t CO2", 291.42, HOURS * KILOWATTS * factor / 1e3, "echoed",
                   f"hours x 400 W x {factor:.4f} kg/kWh, the 7B's in the same table", TABLE),
            Figure("utilisation", "%", None, 100 * implied_mfu(flops, "a100_80gb_sxm", HOURS),
                   "implied", "causal FLOPs over the table's hours of the peak", "counted"),
        ),
    )  # fmt: skip
