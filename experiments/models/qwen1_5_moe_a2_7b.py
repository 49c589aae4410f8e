"""Qwen1.5-MoE-A2.7B: 14.3B parameters, 2.7B a token, upcycled from Qwen-1.8B.

Published (its blog post): a quarter of the cost of training Qwen1.5-7B; neither tokens nor
hardware, hours, dollars or recipe. The plan is for one trillion tokens, with a recipe and a number
of GPUs that are assumed.

moejax plan: 11.14K device-hours, $33.31K at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "qwen1_5_moe_a2_7b",
        tokens=1e12,
        micro_batches=4,
        hardware="h100_sxm",
        mesh={"fsdp": 8, "expert": 4},
    )
