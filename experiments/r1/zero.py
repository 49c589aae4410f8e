"""R1-Zero in miniature: reinforcement of a base model that saw no task text at all.

Claim: reinforcement alone, without supervised examples, teaches a base model to solve problems
(DeepSeek-R1-Zero, arXiv 2501.12948, section 2.2).

The base is pre-trained on the source of Python's standard library, and on nothing else: what it
knows of ``not True or False =`` is from code. The question is a boolean expression of three
or four literals, the answer is what follows, without thinking: a model of this size that never saw
``<think>`` would have to write four tags by chance before its first reward.

What it can show: whether reward alone gets a base to the two words that are answers, and from there
beyond the better of two constant answers, which are right in half of the problems. What it cannot:
reasoning in words, and a longer answer where it helps.

    moejax train --config=experiments/r1/zero.py --workdir=runs/r1_zero --config.seed=0

Hardware: 2 CPU cores, 9 minutes, $0.014. Found, seed 0: pass@1 from 0.007 to 0.487 in 50 rollouts
and to 0.603 in 400, of which a constant answer has 0.51 (experiments/results/r1/zero).
"""

import ml_collections
import stages

TASK = {"names": ("boolean",), "difficulties": (1, 2)}
PLAIN = {"template": "plain"}
HELD_OUT = {"problems": 100, "samples": 8, "every": 50}


def get_config() -> ml_collections.ConfigDict:
    """The pipeline; every field can be changed with --config.pipeline[N].FIELD=VALUE."""
    moe = stages.model(width=96, layers=3, experts=8)
    return ml_collections.ConfigDict({
        "pipeline": (
            stages.pretrain("base", moe, 400, 0, {"source": "stdlib"}),
            stages.reinforce("zero", moe, "@base", TASK, 400, 0, rate=3e-4, max_tokens=7,
                             evaluation=HELD_OUT, prompt=PLAIN, prompt_tokens=72,
                             rl={"entropy_weight": 0.005}),
        )
    })  # fmt: skip
