"""Qwen3-0.6B: dense, pre-trained on 36T tokens.

Published (arXiv 2505.09388, section 3): the tokens; neither hardware nor hours, dollars or recipe,
which are assumed here, and so is the number of GPUs. All tokens are in rows of 4,096, though the
last ones were in longer ones.

moejax plan: 122.9K device-hours, $367.4K at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "qwen3_0_6b",
        tokens=36e12,
        micro_batches=4,
        hardware="h100_sxm",
        mesh={"data": 64},
    )
