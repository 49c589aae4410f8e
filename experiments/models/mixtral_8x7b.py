"""Mixtral-8x7B: 46.7B parameters, 12.9B a token.

Published (arXiv 2401.04088): neither tokens nor hardware, hours, dollars or recipe. The plan is for
one trillion tokens, with a recipe and a number of GPUs that are assumed.

moejax plan: 57.4K device-hours, $171.6K at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "mixtral_8x7b",
        tokens=1e12,
        micro_batches=4,
        hardware="h100_sxm",
        mesh={"fsdp": 8, "expert": 8},
    )
