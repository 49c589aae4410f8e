"""DeepSeekMoE's two steps from GShard's shape: a shared expert, then finer experts.

Claim: both help. DeepSeekMoE (arXiv 2401.06066, table 1 and figure 3): 16 experts, two active, as
GShard has, end at 1.867 nats on the Pile after 100B tokens; 63 of a quarter's width, seven active
beside a shared one, at 1.808, with the same active and total parameters; GShard needs experts and
FLOPs of 1.5 times the size for that (table 2).

Variants are those of figure 3: 16 with two active (``coarse``); 15 with one active beside a shared
one; 31 of half the width, three beside one; 63 of a quarter, seven beside one (``fine_shared``).
Softmax gates as they are and DeepSeekMoE's balance loss of 0.01. Wider routers are paid for with
steps, so that training FLOPs are equal.

What it can show: the order, and the sum of both steps. What it cannot: how much is due to what
experts specialise in, which takes longer than 300 steps.

    moejax ablate --config=experiments/ablations/fine_grained_shared.py \\
      --workdir=runs/fine_grained_shared

Found (results/ablations/fine_grained_shared): cannot tell; fine_shared higher by 0.008 bits per
byte (-0.003 to +0.018), the order of the second step as published; finer experts less balanced.

Hardware: 2 CPU cores, about 16 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation

GSHARD = {
    "router": {"name": "deepseek_moe", "sequence_loss_weight": 0.01},
    "moe": {"num_experts": 16, "top_k": 2, "d_expert": 64},
}


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    finer = lambda m: {
        "moe.num_shared_experts": 1,
        "moe.num_experts": 16 * m - 1,
        "moe.top_k": 2 * m - 1,
        "moe.d_expert": 64 // m,
    }
    return ablation(
        "fine_grained_shared",
        base=GSHARD,
        variants={
            "coarse": {},
            "coarse_shared": finer(1),
            "half_shared": finer(2),
            "fine_shared": finer(4),
        },
        reference="coarse",
        hold="flops",
        tuning=TUNING,
        claim={
            "text": "Fine-grained experts beside a shared one are better than coarse ones.",
            "source": "DeepSeekMoE, arXiv 2401.06066, table 1 and figure 3",
            "direction": "fine_shared",
            "numbers": "1.808 against 1.867 nats on the Pile, 2B parameters, 100B tokens",
        },
    )
