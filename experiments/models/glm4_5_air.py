"""GLM-4.5-Air: 106B parameters, 12B a token, pre-trained on 23T tokens.

Published (arXiv 2508.06471, section 2): tokens and recipe, GLM-4.5's; neither hardware nor hours
nor dollars. H100, their number and the warm-up are assumed here; all tokens are in rows of 4,096.

moejax plan: 1.598M device-hours, $4.779M at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "glm4_5_air",
        tokens=23e12,
        batch_size=16_384,
        micro_batches=32,
        hardware="h100_sxm",
        mesh={"fsdp": 16, "expert": 16},
        optim={"optimizer": "muon", "learning_rate": 2.5e-4, "warmup_steps": 2000},
        router={"bias_stop_step": round(15e12 / (16_384 * 4096))},
        train={"mtp_weight": 0.3, "mtp_weight_final": 0.1, "mtp_switch": 15 / 23},
    )
