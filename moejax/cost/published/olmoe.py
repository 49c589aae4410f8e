"""OLMoE-1B-7B: 5.1T tokens on 256 H100 for about ten days."""

from moejax.cost.counts import count
from moejax.cost.published.figures import Bill, Figure, implied_mfu, train_flops
from moejax.models.presets import PRESETS

PAPER = "arXiv 2409.02060"
TOKENS, LENGTH, GPUS, DAYS = 5.133e12, 4096, 256, 10


def bill() -> Bill:
    """The bill of pre-training; the paper gives no dollars."""
    model = PRESETS["olmoe_1b_7b"]
    params, flops = count(model, LENGTH).params, TOKENS * train_flops(model, LENGTH)
    taken = GPUS * DAYS * 24
    config = "counted from its config"
    return Bill(
        "olmoe",
        "OLMoE-1B-7B, 6.9B parameters, 1.3B a token",
        (PAPER,),
        ("5.133T tokens in rows of 4,096", "256 H100 for about 10 days"),
        (
            Figure("parameters", "", 6.9e9, params.total, "derived", config, PAPER),
            Figure("active parameters", "", 1.3e9, params.active.with_embeddings, "derived",
                   f"{config}, with both embeddings", PAPER, 0.02),
            Figure("pre-training", "GPU-hours", None, taken, "implied",
                   "256 GPUs x 10 days", "counted"),
            Figure("utilisation", "%", None, 100 * implied_mfu(flops, "h100_sxm", taken),
                   "implied", "FLOPs over those hours of the peak", "counted"),
        ),
    )  # fmt: skip
