"""Qwen2.5-72B: dense, pre-trained on 18T tokens.

Published (arXiv 2412.15115, section 3): the tokens; neither hardware nor hours, dollars or recipe,
which are assumed here, and so is the number of GPUs.

moejax plan: 5.483M device-hours, $16.395M at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "qwen2_5_72b",
        tokens=18e12,
        micro_batches=8,
        hardware="h100_sxm",
        mesh={"fsdp": 64},
    )
