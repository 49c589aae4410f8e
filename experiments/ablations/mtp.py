"""Multi-token prediction on and off.

Claim: predicting a second token helps the first. DeepSeek-V3 (arXiv 2412.19437, table 4, section
4.5.1): with one MTP module, thrown away afterwards, most benchmarks rise at equal data: HumanEval
20.7 to 26.8 and GSM8K 25.4 to 31.4 for 15.7B parameters on 1.33T tokens; 44.5 to 53.7 and 72.3 to
74.0 for 228.7B on 540B. The weight of its loss is V3's, 0.3 and then 0.1 for the last third.

Held equal are tokens, as there. The module costs about half as much again in training FLOPs here,
where four layers and a small vocabulary are the whole model; in V3 it is 4 %. For equal FLOPs:
--config.budget.hold=flops, and --config.budget.amounts as printed by the plan.

What it can show: what the second loss does to the first at this size, where a model is small and
trained briefly. What it cannot: planning ahead, on which the gains in code and mathematics rest;
those are measured by benchmarks, not by loss.

    moejax ablate --config=experiments/ablations/mtp.py --workdir=runs/mtp

Found (results/ablations/mtp): cannot tell; MTP lower by 0.012 bits per byte (-0.024 to +0.0003) at
equal tokens, for 1.47 times the training FLOPs, which it has at this size.

Hardware: 2 CPU cores, about 10 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "mtp",
        variants={"next_token": {}, "mtp": {"model.mtp_depth": 1}},
        reference="next_token",
        hold="tokens",
        tuning=TUNING,
        claim={
            "text": "Multi-token prediction improves the model at equal data.",
            "source": "DeepSeek-V3, arXiv 2412.19437, table 4",
            "direction": "mtp",
            "numbers": "HumanEval 20.7 to 26.8, GSM8K 25.4 to 31.4 at 15.7B, 1.33T tokens",
        },
    )
