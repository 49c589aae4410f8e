"""Kimi-K2: 1.04T parameters, 32.6B a token, pre-trained on 15.5T tokens.

Published (arXiv 2507.20534, sections 2.4 and 2.5): H800 GPUs; neither their number nor hours or
dollars.

MuonClip (here Muon, without the clipping of attention's logits), 2e-4 after 500 steps, constant for
10T tokens, a cosine to 2e-5 over 5.5T (here a line), 67M tokens a step. The number of GPUs is
assumed here.

moejax plan: 2.296M device-hours, $4.592M at $2 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "kimi_k2",
        tokens=15.5e12,
        batch_size=16_384,
        micro_batches=8,
        hardware="h800_sxm",
        mesh={"fsdp": 32, "expert": 64},
        optim={
            "optimizer": "muon",
            "learning_rate": 2e-4,
            "warmup_steps": 500,
            "schedule": "wsd",
            "decay_fraction": 5.5 / 15.5,
        },
    )
