"""DeepSeek-R1-Zero: reinforcement learning on V3's base, on 512 H800."""

from moejax.cost.published.figures import Bill, Figure

SOURCE = "Nature 645 (2025), supplementary table of training costs"
GPUS, RUN_HOURS, RATE = 512, 198, 2.0
HOURS = 101e3


def bill() -> Bill:
    """The bill of R1-Zero; its base's is ``deepseek_v3``."""
    return Bill(
        "deepseek_r1_zero",
        "DeepSeek-R1-Zero, on top of DeepSeek-V3",
        ("DeepSeek-R1, Nature 645 (2025)",),
        ("64 x 8 H800 for about 198 hours", "$2 an hour"),
        (
            Figure("reinforcement learning", "GPU-hours", HOURS, GPUS * RUN_HOURS, "echoed",
                   "512 GPUs x 198 hours", SOURCE),
            Figure("reinforcement learning, dollars", "USD", 202e3, RATE * HOURS, "echoed",
                   "101K hours x $2", SOURCE),
        ),
    )  # fmt: skip
