"""DeepSeek-V2: 236B parameters, 21B a token, pre-trained on 8.1T tokens.

Published (arXiv 2405.04434, sections 3.1.2 and 3.2.3): 172.8K H800 hours a trillion tokens, so
1,400K hours, $2.80M at V3's $2; no dollars of its own.

AdamW, 2.4e-4 after 2,000 steps, times 0.316 at 60 % and 90 % of the tokens (here a line from 60 %
on), 2,304 rows rising to 9,216 over 225B tokens (here 9,216 throughout). The number of GPUs is
assumed here.

moejax plan: 907.0K device-hours, $1.814M at $2 an hour.

The published hours are a utilisation of 25.2 %, by these FLOPs.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "deepseek_v2",
        tokens=8.1e12,
        batch_size=9216,
        micro_batches=36,
        hardware="h800_sxm",
        mesh={"fsdp": 16, "expert": 16},
        optim={
            "learning_rate": 2.4e-4,
            "warmup_steps": 2000,
            "schedule": "wsd",
            "decay_fraction": 0.4,
        },
    )
