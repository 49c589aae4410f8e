"""DeepSeek-R1 in miniature, small: pre-training, cold start, reinforcement, rejection sampling.

The question is the sum of two numbers of three digits. Stages, in order: a base model on the
standard library's source and on worked answers; supervised training on more of these; reinforcement
by group-relative policy optimization; the policy's own right answers as pairs; a dense model of the
same active size trained on them, and one trained by reinforcement alone.

    moejax train --config=experiments/r1/small.py --workdir=runs/r1_small

Hardware: 2 CPU cores.
"""

import ml_collections
import stages

TASK = {"names": ("add",), "difficulties": (3,)}


def get_config(seed: int = 0) -> ml_collections.ConfigDict:
    """The pipeline; every field can be changed with --config.pipeline.N.FIELD=VALUE."""
    moe = stages.model(width=96, layers=3, experts=8)
    return ml_collections.ConfigDict({
        "pipeline": (
            stages.pairs("cold_pairs", TASK, 8_000, seed),
            stages.sft("cold_start", moe, "", "@cold_pairs", 250, seed, rate=3e-3),
            stages.reinforce("rl", moe, "@cold_start", TASK, 40, seed),
        )
    })  # fmt: skip
