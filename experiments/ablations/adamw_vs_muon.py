"""AdamW against Muon, over a ladder of four budgets.

Claim: Muon reaches AdamW's loss with about 52 % of its training FLOPs. Moonlight (arXiv 2502.16982,
section 3): scaling-law runs of dense models, each compute-optimal, with the weight decay and the
update scale that are used here, by which both optimizers can share a learning rate.

Muon takes the matrices of attention and of experts; embedding, head, routers and norms stay with
AdamW. Equal are training FLOPs of the model, which are the same a token. An optimizer's own FLOPs
are not counted: Muon's products are about half of a step's here, with small matrices and small
batches, and a few per mille in a large run. Seconds show it, FLOPs do not.

What it can show: the FLOPs multiplier between 75 and 600 steps, with learning rates bracketed for
each. What it cannot: time, for the reason above, and stability in long runs.

    moejax ablate --config=experiments/ablations/adamw_vs_muon.py --workdir=runs/adamw_vs_muon

Found (results/ablations/adamw_vs_muon): agrees in direction. Muon reaches AdamW's loss with 1.31
times fewer training FLOPs (1.23 to 1.39) over budgets of 75 to 600 steps, where the paper has 1.9;
at the largest it ends 0.080 bits per byte lower (0.066 to 0.094). In seconds of these cores 1.18
times (0.96 to 1.45).

Hardware: 2 CPU cores, about 15 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "adamw_vs_muon",
        variants={"adamw": {}, "muon": {"optim.optimizer": "muon"}},
        reference="adamw",
        hold="flops",
        steps=(75, 150, 300, 600),
        tuning=TUNING,
        claim={
            "text": "Muon reaches AdamW's loss with about half of the training FLOPs.",
            "source": "Moonlight, arXiv 2502.16982, section 3",
            "direction": "muon",
            "numbers": "about 52 % of the FLOPs, compute-optimal dense models",
        },
    )
