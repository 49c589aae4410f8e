"""DeepSeek-R1: what came on top of V3, R1-Zero included. No ablations, no earlier runs."""

from moejax.cost.published import deepseek_r1_zero, deepseek_v3
from moejax.cost.published.deepseek_r1_zero import RATE, SOURCE
from moejax.cost.published.figures import Bill, Figure

GPUS, RUN_HOURS = 512, 80
HOURS, DATA_HOURS = 41e3, 5e3


def bill() -> Bill:
    """The bill of R1, by its paper's stages."""
    total = deepseek_r1_zero.HOURS + DATA_HOURS + HOURS
    base = deepseek_v3.bill().figure("all stages, dollars").computed
    return Bill(
        "deepseek_r1",
        "DeepSeek-R1, on top of DeepSeek-V3",
        ("DeepSeek-R1, Nature 645 (2025)",),
        ("64 x 8 H800 for about 80 hours", "5K hours to make SFT data", "R1-Zero's 101K hours",
         "$2 an hour"),
        (
            Figure("R1", "GPU-hours", HOURS, GPUS * RUN_HOURS, "echoed",
                   "512 GPUs x 80 hours", SOURCE),
            Figure("R1, dollars", "USD", 82e3, RATE * HOURS, "echoed", "41K hours x $2", SOURCE),
            Figure("SFT data, dollars", "USD", 10e3, RATE * DATA_HOURS, "echoed",
                   "5K hours x $2", SOURCE),
            Figure("R1-Zero, SFT data and R1", "GPU-hours", 147e3, total, "echoed",
                   "101K + 5K + 41K hours", SOURCE),
            Figure("R1-Zero, SFT data and R1, dollars", "USD", 294e3, RATE * total, "echoed",
                   "147K hours x $2", SOURCE),
            Figure("with its base model, dollars", "USD", None, base + RATE * total, "implied",
                   "V3's 5.576M + 0.294M", "counted"),
        ),
    )  # fmt: skip
