"""gpt-oss-20b: 20.9B parameters, 3.6B a token, trained on "trillions" of tokens.

Published (model card, arXiv 2508.10925): almost ten times fewer H100 hours than the 2.1M of
gpt-oss-120b; neither tokens nor dollars nor recipe. The plan is for one trillion tokens, with a
recipe and a number of GPUs that are assumed.

moejax plan: 16.50K device-hours, $49.35K at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "gpt_oss_20b",
        tokens=1e12,
        micro_batches=8,
        hardware="h100_sxm",
        mesh={"fsdp": 8, "expert": 8},
    )
