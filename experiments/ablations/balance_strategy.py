"""How experts are kept busy: nothing, losses over several scopes and weights, a bias, a z-loss.

Claims: balancing matters, and the wider its scope, the less it costs. ReMoE (arXiv 2412.14711):
average accuracy 37.67 without balancing against 39.67 with, and 38.20 dense. DeepSeek-V3 (arXiv
2412.19437, section 4.5.3), 1B MoE: validation loss 2.258 with a sequence-wise loss, 2.253 with a
batch-wise one and 2.253 with the bias; 3B: 2.085, 2.080, 2.080. Demons in the detail (arXiv
2501.11873): the loss over the global batch, not by micro-batch, is nearly free and lets experts
specialise by domain. The z-loss (ST-MoE, arXiv 2202.08906) is for stability, not for balance.

Scores and gates are the same in all variants, sigmoids over their sum; one thing changes at a time:
no balancing; the loss over the whole batch of 16 rows at 0.001, 0.01 and 0.1; at 0.01 of each row
by itself; of micro-batches of four rows, and with their loads summed over the step; the bias, its
step ten times V3's for the short run; the z-loss alone. A batch is one micro-batch but where it
says otherwise, so that ``aux`` is already the global batch's loss, on one device.

What it can show: what balance by each costs in loss and reaches in MaxVio. What it cannot: domains,
since the text is all Python; devices that wait for one another.

    moejax ablate --config=experiments/ablations/balance_strategy.py --workdir=runs/balance_strategy

Found (results/ablations/balance_strategy): cannot tell the balancers apart in loss: all eight but
the z-loss end within 0.007 bits per byte of the sequence-wise loss (0.006 to either side), the bias
lowest (p = 0.26 after Holm). The z-loss alone ends 0.016 below (0.010 to 0.023), with the worst
balance of all, MaxVio 7.6 against 0.4 to 0.6 with a bias or a loss of 0.01 and more, and 4.8 with
nothing.

Hardware: 2 CPU cores, about 22 minutes with --processes=2. The learning rate is the base's for all:
model and optimizer are the same.
"""

from typing import Any

from base import ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    loss = lambda kind, weight: {"router.bias_rule": "none", f"router.{kind}_loss_weight": weight}
    return ablation(
        "balance_strategy",
        variants={
            "none": {"router.bias_rule": "none"},
            "aux_0.001": loss("balance", 0.001),
            "aux_0.01": loss("balance", 0.01),
            "aux_0.1": loss("balance", 0.1),
            "sequence_0.01": loss("sequence", 0.01),
            "micro_batch_0.01": {**loss("balance", 0.01), "train.micro_batches": 4},
            "global_batch_0.01": {**loss("global", 0.01), "train.micro_batches": 4},
            "bias": {},
            "z_0.001": loss("z", 0.001),
        },
        reference="sequence_0.01",
        hold="tokens",
        claim={
            "text": "Balancing over batches, by a loss or a bias, is better than by sequence.",
            "source": "DeepSeek-V3, arXiv 2412.19437, section 4.5.3",
            "direction": "bias",
            "numbers": "2.253 (batch-wise loss, bias) against 2.258 (sequence-wise), 1B MoE",
        },
    )
