"""How many of the first layers are dense.

Claim: the first one should be. DeepSeekMoE 16B (arXiv 2401.06066, section 5.1.2) has MoE layers
everywhere but in the first, where the load balances especially slowly; V2 keeps one dense layer, V3
three (arXiv 2412.19437, section 4.2), OLMoE none.

Variants have none, one or two dense layers of four, as wide as a token's active experts. Fewer
dense layers hold more parameters; their routers are paid for with steps, so that training FLOPs
are equal.

What it can show: the balance of the first layer beside the others (MaxVio by layer), and whether
what it holds is worth more than that costs. What it cannot: three dense layers of 61 are 5 %, one
of four is 25 %.

    moejax ablate --config=experiments/ablations/first_k_dense.py --workdir=runs/first_k_dense

Found (results/ablations/first_k_dense): cannot tell. One dense layer ends 0.003 bits per byte below
none (-0.014 to +0.008), two end 0.008 below (-0.018 to +0.003). The first MoE layer does not
balance worse than the others: MaxVio 0.44 to 0.57 from the first layer to the last.

Hardware: 2 CPU cores, about 12 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "first_k_dense",
        variants={f"dense{k}": {"model.first_k_dense": k} for k in (0, 1, 2)},
        reference="dense0",
        hold="flops",
        tuning=TUNING,
        claim={
            "text": "The load of a first MoE layer balances especially slowly; make it dense.",
            "source": "DeepSeekMoE, arXiv 2401.06066, section 5.1.2",
            "direction": "dense1",
            "numbers": "none; DeepSeekMoE and V2 have one dense layer, V3 three of 61",
        },
    )
