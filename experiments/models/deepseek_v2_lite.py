"""DeepSeek-V2-Lite: 15.7B parameters, 2.4B a token, pre-trained on 5.7T tokens.

Published (arXiv 2405.04434, appendix B): H800 GPUs; neither their number nor hours or dollars.

AdamW, 4.2e-4 after 2,000 steps, times 0.316 at 80 % and 90 % of the tokens (here a line from 80 %
on), 4,608 rows a step. The number of GPUs is assumed here.

moejax plan: 67.4K device-hours, $134.9K at $2 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "deepseek_v2_lite",
        tokens=5.7e12,
        batch_size=4608,
        micro_batches=18,
        hardware="h800_sxm",
        mesh={"fsdp": 8, "expert": 8},
        optim={
            "learning_rate": 4.2e-4,
            "warmup_steps": 2000,
            "schedule": "wsd",
            "decay_fraction": 0.2,
        },
    )
