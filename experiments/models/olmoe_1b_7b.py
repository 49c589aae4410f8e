"""OLMoE-1B-7B: 6.9B parameters, 1.3B a token, pre-trained on 5.1T tokens.

Published (arXiv 2409.02060, section 2 and appendix B): 256 H100 for about 10 days, so about 61K
hours; no dollars.

AdamW, 4e-4 after 2,500 steps, cosine to 4e-5, the last 100B tokens to 0 (here the cosine
throughout); 4M tokens a step; balance loss 0.01, z-loss 0.001.

moejax plan: 29.11K device-hours, $87.0K at $2.99 an hour.

The published days are a utilisation of 18.5 %, by these FLOPs.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "olmoe_1b_7b",
        tokens=5.133e12,
        hardware="h100_sxm",
        mesh={"data": 8, "fsdp": 4, "expert": 8},
        optim={"learning_rate": 4e-4, "warmup_steps": 2500, "final_fraction": 0.1},
    )
