"""Dense against MoE at equal active FLOPs, over a ladder of four budgets.

Claim: an MoE reaches a dense model's loss with about a third of the compute. OLMoE (arXiv
2409.02060, section 4.1.1): 1.3B dense against 1.3B of 6.9B active, 130B tokens each; about three
times fewer tokens or FLOPs, and about twice as fast in time (23,600 against 37,500 tokens/s a GPU).
DeepSeekMoE (arXiv 2401.06066, table 1): 0.2B dense 2.060 nats on the Pile after 100B tokens, GShard
1.867 and DeepSeekMoE 1.808 of the same activated expert parameters.

Equal: training FLOPs of every budget, and to within 1 % those of a token; the dense layers are
eight channels wider than the MoE's active width, which is what the three routers cost. The MoE
holds 3.3 times the dense model's parameters. Learning rates are bracketed for each.

What it can show: whether the MoE is ahead at equal FLOPs, and the FLOPs multiplier between the
smallest and largest budget, 75 to 600 steps. What it cannot: the multiplier of large runs, which
grows with budget and number of experts; and seconds or dollars, where this ranks CPU kernels.

    moejax ablate --config=experiments/ablations/dense_vs_moe.py --workdir=runs/dense_vs_moe

Found (results/ablations/dense_vs_moe): cannot tell; the MoE lower by 0.014 bits per byte (-0.047 to
+0.019), 1.07 times fewer FLOPs for the same loss (0.92 to 1.24).

Hardware: 2 CPU cores, about 16 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "dense_vs_moe",
        variants={"dense": {"moe": None, "model.d_ff": 136}, "moe": {}},
        reference="dense",
        hold="flops",
        steps=(75, 150, 300, 600),
        tuning=TUNING,
        claim={
            "text": "An MoE reaches a dense model's loss with about three times fewer FLOPs.",
            "source": "OLMoE, arXiv 2409.02060, section 4.1.1",
            "direction": "moe",
            "numbers": "3 times fewer tokens or FLOPs, 2 times less time, at 1.3B active of 6.9B",
        },
    )
