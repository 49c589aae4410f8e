"""Loss-free balancing by a selection bias against an auxiliary loss: loss, and MaxVio by layer.

Claim: the bias balances better and costs no loss. Loss-free balancing (arXiv 2408.15664, table 2):
validation perplexity 9.50 against 9.56 at 1B parameters and 100B tokens, 7.92 against 7.97 at 3B
and 200B; MaxVio over the validation set 0.04 against 0.72, and 0.04 against 0.52. Sigmoid gates,
the loss's weight 0.001.

Scores and gates are the same in all variants, sigmoids over their sum, so that only balancing
changes: nothing; the loss of the whole batch at 0.001 and at 0.01; the bias, whose step of 0.01 is
ten times the paper's, since 300 steps are too few for 0.001.

What it can show: both, loss and balance, for short runs. What it cannot: a difference in perplexity
of 0.6 %, which is 0.006 nats a token or 0.003 bits per byte here, unless it grows at this size; and
a bias that has come to rest.

    moejax ablate --config=experiments/ablations/loss_free_bias.py --workdir=runs/loss_free_bias

Found (results/ablations/loss_free_bias): cannot tell on loss, the bias lower by 0.004 bits per byte
(-0.009 to +0.001); MaxVio over held-out text 0.52 against 1.65, told apart in every comparison.

Hardware: 2 CPU cores, about 10 minutes with --processes=2. The learning rate is the base's for all:
model and optimizer are the same.
"""

from typing import Any

from base import ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    loss = lambda weight: {"router.bias_rule": "none", "router.balance_loss_weight": weight}
    return ablation(
        "loss_free_bias",
        variants={
            "none": {"router.bias_rule": "none"},
            "aux_0.001": loss(0.001),
            "aux_0.01": loss(0.01),
            "bias": {},
        },
        reference="aux_0.001",
        hold="tokens",
        claim={
            "text": "A selection bias balances better than an auxiliary loss, at a lower loss.",
            "source": "Loss-free balancing, arXiv 2408.15664, table 2",
            "direction": "bias",
            "numbers": "perplexity 9.50 against 9.56, MaxVio 0.04 against 0.72 at 1B",
        },
    )
