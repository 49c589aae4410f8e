"""No, one or two shared experts, with the same active and total parameters.

Claims, which disagree. DeepSeekMoE (arXiv 2401.06066): isolating shared experts helps (figure 3),
and one, two or four of them end at 1.808, 1.806 and 1.811 nats on the Pile. OLMoE (arXiv
2409.02060, section 4.1.3): 32 experts with four active against 31 with three active beside a shared
one are much alike, with the shared expert slightly worse, so OLMoE has none.

Here: 33 routed experts with four active, 32 with three beside one shared, 31 with two beside two.
FLOPs of a token agree within 0.1 %.

What it can show: differences of a few thousandths of a bit per byte at best, about what is
published. What it cannot: redundancy among experts, which builds up over far more tokens.

    moejax ablate --config=experiments/ablations/shared_experts.py --workdir=runs/shared_experts

Found (results/ablations/shared_experts): cannot tell. One shared expert ends 0.006 bits per byte
higher than none (-0.006 to +0.019), two 0.009 higher; with two, MaxVio of the routed experts rises
by 0.19.

Hardware: 2 CPU cores, about 12 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    shared = lambda n: {
        "moe.num_shared_experts": n,
        "moe.num_experts": 33 - n,
        "moe.top_k": 4 - n,
    }
    return ablation(
        "shared_experts",
        variants={f"shared{n}": shared(n) for n in (0, 1, 2)},
        reference="shared0",
        hold="tokens",
        tuning=TUNING,
        claim={
            "text": "A shared expert helps (DeepSeekMoE); OLMoE finds it slightly worse.",
            "source": "DeepSeekMoE, arXiv 2401.06066, figure 3; OLMoE, arXiv 2409.02060, 4.1.3",
            "direction": "shared1",
            "numbers": "1, 2, 4 shared: 1.808, 1.806, 1.811 nats on the Pile",
        },
    )
