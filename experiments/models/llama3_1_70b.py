"""Llama-3.1-70B: dense, pre-trained on more than 15T tokens.

Published (arXiv 2407.21783, table 3, and the model card): 7.0M H100 hours, 2,040 t CO2; no dollars.

AdamW, 1.5e-4. The rest of the recipe is the 405B's, and the number of GPUs is assumed.

moejax plan: 4.614M device-hours, $13.796M at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "llama3_1_70b",
        tokens=15e12,
        batch_size=2048,
        seq_len=8192,
        micro_batches=8,
        hardware="h100_sxm",
        mesh={"data": 4, "fsdp": 64, "tensor": 8},
        optim={"learning_rate": 1.5e-4, "warmup_steps": 8000, "final_fraction": 0.01},
    )
