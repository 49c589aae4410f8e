"""Qwen3-8B: dense, pre-trained on 36T tokens.

Published (arXiv 2505.09388, section 3): the tokens; neither hardware nor hours, dollars or recipe,
which are assumed here, and so is the number of GPUs. All tokens are in rows of 4,096, though the
last ones were in longer ones.

moejax plan: 1.209M device-hours, $3.614M at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "qwen3_8b",
        tokens=36e12,
        micro_batches=4,
        hardware="h100_sxm",
        mesh={"data": 8, "fsdp": 16},
    )
