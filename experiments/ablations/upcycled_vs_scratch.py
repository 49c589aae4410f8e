"""An MoE upcycled from a dense model against one trained from scratch, the dense run charged.

Claims, which disagree. Sparse upcycling (arXiv 2212.05055): upcycled T5 and ViT models beat dense
ones with about 50 % of the dense pre-training's cost on top, and sparse ones trained from scratch
with 100 % of it. OLMoE (arXiv 2409.02060, section 4.1.5): from a dense model of 2T tokens, the MoE
from scratch catches up after 500B tokens and is ahead at 600B, 25 % of the dense budget, not 120 %;
so it is trained from scratch.

Both papers take the dense model for granted. Here it is paid for: of the upcycled variant's
training FLOPs, half go into the dense run, whose layers are then cut into four shards, one for the
shared expert and three copied eleven times, with a new router. So the question is whether to train
dense first, not whether to use a dense model that is there.

Equal: training FLOPs, those of the dense run included. A dense token costs 2 % less than the MoE's,
which has the routers.

What it can show: that answer at this size. What it cannot: sunk costs, which are the papers' case.

    moejax ablate --config=experiments/ablations/upcycled_vs_scratch.py \\
      --workdir=runs/upcycled_vs_scratch

Found (results/ablations/upcycled_vs_scratch): agrees; scratch is better by 0.025 bits per byte
(0.015 to 0.035).

Hardware: 2 CPU cores, about 5 minutes with --processes=2. The learning rate is the base's for both:
their models are the same, but for what the first starts from.
"""

from typing import Any

from base import ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    config = ablation(
        "upcycled_vs_scratch",
        base={"moe.num_experts": 33},
        variants={"scratch": {}, "upcycled": {}},
        reference="scratch",
        hold="flops",
        claim={
            "text": "With the dense run charged, upcycling does not pay.",
            "source": "OLMoE, arXiv 2409.02060, section 4.1.5; against arXiv 2212.05055",
            "direction": "scratch",
            "numbers": "scratch ahead after 25 % of the dense run's budget",
        },
    )
    # The dense run stays at its learning rate: the decay comes after.
    config["upcycle"] = {
        "upcycled": {"edits": {"moe": None, "optim.decay_fraction": 0.0}, "share": 0.5}
    }
    return config
