"""R1-Zero in miniature: reinforcement of a base model that saw no task text at all.

Claim: reinforcement alone, without supervised examples, teaches a base model to solve problems
(DeepSeek-R1-Zero, arXiv 2501.12948, section 2.2).

The base is pre-trained on the source of Python's standard library, and on nothing else: whatever it
knows of ``3+4=`` is from code and its comments. The question is a sum of two numbers of one digit,
the answer is what follows, without thinking: a model of this size that never saw ``<think>`` would
have to write four tags by chance before its first reward.

What it can show: whether reward alone gets a base from chance to right answers. What it cannot:
reasoning, which one-digit sums do not need, and a longer answer where it helps.

    moejax train --config=experiments/r1/zero.py --workdir=runs/r1_zero --config.seed=0

Hardware: 2 CPU cores; not yet run as a whole, so neither timed nor recorded.
"""

import ml_collections
import stages

TASK = {"names": ("add",), "difficulties": (1,)}
PLAIN = {"template": "plain"}
# One in ten of the 55 unordered pairs of digits is held out in either split.
HELD_OUT = {"problems": 5, "samples": 64, "every": 50}


def get_config() -> ml_collections.ConfigDict:
    """The pipeline; every field can be changed with --config.pipeline[N].FIELD=VALUE."""
    moe = stages.model(width=96, layers=3, experts=8)
    return ml_collections.ConfigDict({
        "pipeline": (
            stages.pretrain("base", moe, 400, 0, {"source": "stdlib"}),
            stages.reinforce("zero", moe, "@base", TASK, 200, 0, rate=3e-4, max_tokens=4,
                             evaluation=HELD_OUT, prompt=PLAIN),
        )
    })  # fmt: skip
