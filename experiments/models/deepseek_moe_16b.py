"""DeepSeekMoE-16B: 16.4B parameters, 2.8B a token, pre-trained on 2T tokens.

Published (arXiv 2401.06066, section 5.1): A100 or H800 GPUs; neither their number nor hours or
dollars.

AdamW, 4.2e-4 after 2,000 steps, times 0.316 at 80 % and 90 % of 106,449 steps of 4,608 rows (here a
line from 80 % on), no dropout, nothing dropped. H800 and their number are assumed here.

moejax plan: 24.80K device-hours, $49.61K at $2 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "deepseek_moe_16b",
        tokens=106_449 * 4608 * 4096,
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
