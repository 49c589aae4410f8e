"""DeepSeek-V3: 671B parameters, 37B a token, pre-trained on 14.8T tokens; R1's base.

Published (arXiv 2412.19437, table 1 and section 4.2): 2,048 H800, 2,664K hours, $5.328M at $2; with
context extension and post-training 2,788K hours, $5.576M. R1 took 147K hours, $0.294M more (Nature,
2025).

AdamW, 2.2e-4 after 2,000 steps, constant to 10T tokens, then a cosine to 2.2e-5 over 4.3T, then
2.2e-5 and 7.3e-6 (here a line from 10T to 2.2e-5); 3,072 rows rising to 15,360 over 469B tokens
(here 15,360 throughout); selection bias frozen for the last 500B; MTP weight 0.3, from 10T on 0.1.

Utilisation: 38.94 % (ISCA 2025, table 4) by FLOPs without the MTP module, which are 250.45 GFLOP a
token; by the 260.64 that count it, 40.5 %, which moejax assumes where nothing is given. The mesh is
not theirs (16 stages, 64 expert-parallel).

moejax plan: 2.672M device-hours, $5.345M at $2 an hour.
"""

import ml_collections
from published import published


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return published(
        "deepseek_v3",
        tokens=14.8e12,
        batch_size=15_360,
        micro_batches=15,
        hardware="h800_sxm",
        mesh={"fsdp": 16, "expert": 64, "tensor": 2},
        optim={
            "learning_rate": 2.2e-4,
            "warmup_steps": 2000,
            "schedule": "wsd",
            "decay_fraction": 1 - 10 / 14.8,
        },
        router={"bias_stop_step": round(14.3e12 / (15_360 * 4096))},
        train={"mtp_weight": 0.3, "mtp_weight_final": 0.1, "mtp_switch": 10 / 14.8},
    )
