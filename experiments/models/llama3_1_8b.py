"""Llama-3.1-8B: dense, pre-trained on more than 15T tokens.

Published (arXiv 2407.21783, table 3, and the model card): 1.46M H100 hours, 420 t CO2; no dollars.

AdamW, 3e-4. The rest of the recipe is the 405B's, and the number of GPUs is assumed.

moejax plan: 528.7K device-hours, $1.581M at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "llama3_1_8b",
        tokens=15e12,
        batch_size=2048,
        seq_len=8192,
        micro_batches=4,
        hardware="h100_sxm",
        mesh={"data": 32, "fsdp": 8},
        optim={"learning_rate": 3e-4, "warmup_steps": 8000, "final_fraction": 0.01},
    )
