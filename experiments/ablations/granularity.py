"""Granularity: finer experts, more of them, with the same active and total width.

Claim: finer is better, with less and less to gain. OLMoE (arXiv 2409.02060, section 4.1.2): from 8
experts, one active, to 32 with four active about 10 % on HellaSwag and MMLU after 130B tokens; from
32 to 64 with eight active another 1 to 2 %. The scaling law for fine-grained MoE (arXiv 2402.07871)
has loss fall with a power of G, 2.1 / G^0.58 over N^0.115, at a fixed expansion of 64.

Four variants are OLMoE's: 8 experts of width 128 with one active, 16 of 64 with two, 32 of 32 with
four, 64 of 16 with eight; a fifth goes one step further, for the fit: 128 of 8 with sixteen. The
router is OLMoE's: softmax without renormalising, balance loss 0.01 and z-loss 0.001, no shared
expert. The share of experts that are active, and with it the sum of fresh gates, is 1/8 in all.
Finer variants pay for wider routers with fewer steps: training FLOPs are equal.

What it can show: the order, and the curve over G that is fitted. What it cannot: the law's
exponent, since loss here is far from where data limits it, and steps with narrow experts cost
CPU kernels more than a GPU's.

    moejax ablate --config=experiments/ablations/granularity.py --workdir=runs/granularity

Found (results/ablations/granularity): disagrees beyond four times finer. Two and four times finer
experts end 0.005 and 0.006 bits per byte below coarse ones, which five seeds cannot tell (0.000 to
0.010; -0.005 to 0.016); eight times finer ends 0.009 above (0.003 to 0.014), sixteen times 0.023
(0.018 to 0.029). No power law over G fits.

Hardware: 2 CPU cores, about 16 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation

OLMOE = {
    "router": {"name": "softmax_topk", "balance_loss_weight": 0.01, "z_loss_weight": 1e-3},
    "moe": {"num_experts": 8, "top_k": 1, "d_expert": 128},
}


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    finer = lambda m: {
        "moe.num_experts": 8 * m,
        "moe.top_k": m,
        "moe.d_expert": 128 // m,
    }
    return ablation(
        "granularity",
        base=OLMOE,
        variants={"g1": {}} | {f"g{m}": finer(m) for m in (2, 4, 8, 16)},
        reference="g1",
        hold="flops",
        tuning=TUNING,
        claim={
            "text": "Finer experts at equal active and total width give a lower loss, with "
            "diminishing returns.",
            "source": "OLMoE, arXiv 2409.02060, section 4.1.2; arXiv 2402.07871",
            "direction": "g8",
            "numbers": "about 10 % on HellaSwag and MMLU from 8 to 32 experts, 1 to 2 % to 64",
        },
    )
