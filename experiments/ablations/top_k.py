"""How many experts a token takes, of the same experts, at equal training FLOPs.

Claim: one is enough. Switch Transformers (arXiv 2101.03961, section 2.1) route to a single expert,
against the belief that the router's gradient needs two, and beat top-2 on a speed-quality basis
(table 1). Models since take more: OLMoE 8 of 64, DeepSeek-V3 8 of 256.

Here one, two, four or eight of 32 experts of width 32, by OLMoE's router (softmax without
renormalising, balance loss 0.01, z-loss 0.001), without a shared expert. More experts a token means
fewer tokens: 61 % more FLOPs a token for eight than for one.

What it can show: whether FLOPs are better spent on more experts a token or on more tokens, for this
size. What it cannot: what communication costs, which grows with K, on which Switch's case rests.

    moejax ablate --config=experiments/ablations/top_k.py --workdir=runs/top_k

Found (results/ablations/top_k): agrees in direction. At equal FLOPs one expert a token ends 0.017
bits per byte below two (0.006 to 0.028), four end 0.018 above and eight 0.081 above; at this budget
a step is worth more than an expert. Balance goes the other way.

Hardware: 2 CPU cores, about 14 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation

OLMOE = {
    "router": {"name": "softmax_topk", "balance_loss_weight": 0.01, "z_loss_weight": 1e-3},
    "moe": {"num_experts": 32, "top_k": 2, "d_expert": 32},
}


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "top_k",
        base=OLMOE,
        variants={"k1": {"moe.top_k": 1}, "k2": {}, "k4": {"moe.top_k": 4}, "k8": {"moe.top_k": 8}},
        reference="k2",
        hold="flops",
        tuning=TUNING,
        claim={
            "text": "Routing to one expert is as good as to two, for less computation.",
            "source": "Switch Transformers, arXiv 2101.03961, sections 2.1 and 2.3",
            "direction": "k1",
            "numbers": "better than top-2 on a speed-quality basis (table 1)",
        },
    )
