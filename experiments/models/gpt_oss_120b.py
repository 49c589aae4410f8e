"""gpt-oss-120b: 116.8B parameters, 5.1B a token, trained on "trillions" of tokens.

Published (model card, arXiv 2508.10925): 2.1M H100 hours; neither tokens nor dollars nor recipe.
The plan is for one trillion tokens, with a recipe and a number of GPUs that are assumed.

moejax plan: 23.55K device-hours, $70.4K at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "gpt_oss_120b",
        tokens=1e12,
        micro_batches=4,
        hardware="h100_sxm",
        mesh={"fsdp": 8, "expert": 16},
    )
