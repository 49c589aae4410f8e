"""Llama-3.1-405B: dense, pre-trained on 15.6T tokens.

Published (arXiv 2407.21783, sections 3.3 and 3.4, and the model card): 16,384 H100, 30.84M hours,
8,930 t CO2; no dollars; 3.8e25 FLOP.

AdamW, 8e-5 after 8,000 steps, cosine to 8e-7; 4M tokens a step in rows of 4,096, later 8M and 16M
in rows of 8,192 (here 16M throughout). Utilisation 41 % at this mesh's size; the card's hours,
whatever they hold, are 34.6 % of the peak.

moejax plan: 26.962M device-hours, $80.616M at $2.99 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "llama3_1_405b",
        tokens=15.6e12,
        batch_size=2048,
        seq_len=8192,
        hardware="h100_sxm",
        mesh={"data": 16, "fsdp": 128, "tensor": 8},
        optim={"learning_rate": 8e-5, "warmup_steps": 8000, "final_fraction": 0.01},
        cost={"mfu": 0.41},
    )
