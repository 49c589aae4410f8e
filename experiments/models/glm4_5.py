"""GLM-4.5: 355B parameters, 32B a token, pre-trained on 23T tokens.

Published (arXiv 2508.06471, section 2): tokens and recipe; neither hardware nor hours nor dollars.

Muon, 2.5e-4 falling by a cosine to 2.5e-5, batches of 16M tokens rising to 64M over 500B (here 64M
throughout), bias step 0.001 and MTP weight 0.3 for 15T tokens, then 0 and 0.1. H100 and their
number are assumed here, and so is the warm-up; all tokens are in rows of 4,096, though the last
ones were in longer ones.

moejax plan: 3.846M device-hours, $11.499M at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "glm4_5",
        tokens=23e12,
        batch_size=16_384,
        micro_batches=16,
        hardware="h100_sxm",
        mesh={"fsdp": 32, "expert": 32},
        optim={"optimizer": "muon", "learning_rate": 2.5e-4, "warmup_steps": 2000},
        router={"bias_stop_step": round(15e12 / (16_384 * 4096))},
        train={"mtp_weight": 0.3, "mtp_weight_final": 0.1, "mtp_switch": 15 / 23},
    )
