"""Number of experts at a fixed active size.

Claim: at constant active parameters, more experts give a lower loss. Kimi K2 (arXiv 2507.20534,
section 2.3): eight active experts and one shared one; a validation loss of 1.5 at sparsity 48
(experts over active experts) takes 1.69, 1.39 and 1.15 times fewer FLOPs than at sparsity 8, 16 and
32. Switch Transformers (arXiv 2101.03961, section 3.1) see the same in steps from 2 to 256 experts.

Variants hold 4, 8, 16, 32 and 64 experts of which a token takes three, so sparsity is 1.3 to 21.
With 64 columns a router makes a token cost 4 % more FLOPs than with 4, which are taken off its
steps.

What it can show: whether more experts help while a run is short, and where that ends; the fit over
the count. What it cannot: the published multipliers. An expert of 64 sees some 28,000 tokens
in the whole run.

    moejax ablate --config=experiments/ablations/expert_count.py --workdir=runs/expert_count

Found (results/ablations/expert_count): does not agree. At equal FLOPs 4, 16, 32 and 64 experts
cannot be told from 8 (all within 0.005 bits per byte, 0.007 to either side); the most, 64, ends
above 16 and 32, which is told apart. No power law over the count fits. In a short run an expert of
many sees too little.

Hardware: 2 CPU cores, about 14 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "expert_count",
        variants={f"e{n}": {"moe.num_experts": n} for n in (4, 8, 16, 32, 64)},
        reference="e8",
        hold="flops",
        tuning=TUNING,
        claim={
            "text": "With the active size fixed, more experts give a lower loss.",
            "source": "Kimi K2, arXiv 2507.20534, section 2.3",
            "direction": "e64",
            "numbers": "sparsity 48 needs 1.69, 1.39, 1.15 times fewer FLOPs than 8, 16, 32",
        },
    )
