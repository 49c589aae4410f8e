"""DeepSeek-V3's FP8 recipe, simulated, against float32.

Claim: the loss differs by less than 0.25 %. DeepSeek-V3 (arXiv 2412.19437, section 3.3): E4M3,
activations in tiles of 1 x 128 and weights in blocks of 128 x 128, against BF16, at 16B and
230B parameters over about 1T tokens.

The model is that of experiments/low_precision.py, whose widths are whole tiles of 128: three layers
of 128 channels, 8 experts of width 128, two chosen beside a shared one, 16 rows of 128 tokens a
step. Nothing but ``model.precision`` changes. 0.25 % of the loss are 0.005 bits per byte.

What it can show: the size and sign of the error that the rounding itself makes. What it cannot:
what tensor cores lose in their sums, which the simulation does in float32; speed, of which it has
none; and trillions of tokens.

    moejax ablate --config=experiments/ablations/low_precision.py --workdir=runs/low_precision

Found (results/ablations/low_precision): agrees: FP8 higher by 0.11 % (-0.02 to +0.24), inside the
published bound; cannot be told from none.

Hardware: 2 CPU cores, about 6 minutes with --processes=2. The learning rate is the base's for both,
since the claim is of a recipe that is otherwise left alone.
"""

from typing import Any

from base import ablation

TILES = {
    "model.d_model": 128,
    "model.d_ff": 384,
    "model.num_layers": 3,
    "model.embedding_multiplier": 11.0,
    "moe": {"num_experts": 8, "top_k": 2, "d_expert": 128, "num_shared_experts": 1},
    "optim.learning_rate": 8e-3,
}


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "low_precision",
        base=TILES,
        variants={"float32": {}, "fp8": {"model.precision": "fp8"}},
        reference="float32",
        hold="tokens",
        steps=(150,),
        claim={
            "text": "FP8 with fine scales changes the loss by less than 0.25 %.",
            "source": "DeepSeek-V3, arXiv 2412.19437, section 3.3",
            "direction": None,
            "numbers": "less than 0.25 % against BF16 at 16B and 230B parameters",
        },
    )
