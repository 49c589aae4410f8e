"""Experts with a fixed capacity, which drop tokens, against dropless dispatch.

Claims: V3 drops no token, in training or inference (arXiv 2412.19437, section 2.1.2). MegaBlocks
(arXiv 2211.15841, section 6.2) trains dropless 1.18 to 1.38 times as fast as Tutel at its best
capacity factors. Switch Transformers, for their part, do better at low capacity factors (arXiv
2101.03961, section 2.3: 1.0 and 1.25), on a speed-quality basis.

Variants are capacity factors 1.0, 1.25 and 2.0, beside dropless. Capacity counts by sequence here:
128 tokens make 12 to 24 slots an expert, and the selection bias balances batches, not sequences, so
that more is dropped than in a large run with a large group. Early positions keep their slots,
which stays causal.

Equal: tokens, steps, and FLOPs as counted, which do not know of drops or padding. What it can show:
what drops cost in loss. What it cannot: speed, the reason for a capacity.

    moejax ablate --config=experiments/ablations/capacity_vs_dropless.py \\
      --workdir=runs/capacity_vs_dropless

Found (results/ablations/capacity_vs_dropless): agrees; dropless is better than 1.0 by 0.009 bits
per byte (0.003 to 0.015), 2.0 by 0.007; 1.0 dropped 26 % of the assignments.

Hardware: 2 CPU cores, about 10 minutes with --processes=2. The learning rate is the base's for all:
the variants differ in nothing that is trained.
"""

from typing import Any

from base import ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    capacity = lambda factor: {"moe.dispatch": "capacity", "moe.capacity_factor": factor}
    return ablation(
        "capacity_vs_dropless",
        variants={
            "dropless": {},
            "capacity_1.0": capacity(1.0),
            "capacity_1.25": capacity(1.25),
            "capacity_2.0": capacity(2.0),
        },
        reference="capacity_1.0",
        hold="tokens",
        claim={
            "text": "Dropping no tokens gives a lower loss than a capacity of 1.0.",
            "source": "DeepSeek-V3, arXiv 2412.19437, section 2.1.2; MegaBlocks, arXiv 2211.15841",
            "direction": "dropless",
            "numbers": "none for the loss; 1.18 to 1.38 times as fast as Tutel with drops",
        },
    )
