"""Qwen2-57B-A14B: 57.4B parameters, 14.2B a token, upcycled from Qwen2-7B with 4.5T tokens.

Published (arXiv 2407.10671, table 1): the tokens; neither hardware nor hours, dollars or recipe,
which are assumed here, and so is the number of GPUs.

moejax plan: 274.4K device-hours, $820.3K at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "qwen2_57b_a14b",
        tokens=4.5e12,
        micro_batches=4,
        hardware="h100_sxm",
        mesh={"fsdp": 8, "expert": 8},
    )
