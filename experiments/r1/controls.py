"""Does reinforcement pay? GRPO against other ways to spend the same dollars on the same start.

Claim: reinforcement on verifiable rewards makes a model better than the supervised data that it
started from can. DeepSeek-R1-Zero (arXiv 2501.12948, section 2.2.4) has AIME pass@1 15.6 % before
reinforcement and 71.0 % after it, from a base model and without a comparison at equal cost.

From one cold start, an MoE trained on 8,000 worked sums of three digits and stopped before its end,
four ways go on, each until it cost what the first one did:

- ``rl``: GRPO, 100 rollouts of 32 questions by eight answers;
- ``more``: supervised training continued, on the same worked sums, which have a gold solution each;
- ``own``: rejection sampling, that is supervised training on the start's own right answers, the
  sampling paid out of the same sum;
- ``dpo``: direct preference optimization on these answers, each beside a wrong one, with the right
  one's cross-entropy added, at the rate of ``rl``.

Each is asked the same held-out problems, which no seed brings into training. What it can show:
which way of spending raises pass@1 most, with its interval over problems; run it with
``--config.seed=N`` for others. What it cannot: gold solutions by rule are what a real problem
lacks, so that ``more`` is a bound rather than a rival.

    moejax train --config=experiments/r1/controls.py --workdir=runs/r1_controls --config.seed=0

Hardware: 2 CPU cores, 14 to 18 minutes, $0.023 to $0.029 a seed. Found over three seeds: GRPO adds
17 points of pass@1, own right answers 49, gold answers 50, preferences 22, which cannot be told
from none (experiments/results/r1/controls).
"""

import ml_collections
import stages

TASK = {"names": ("add",), "difficulties": (3,)}
HELD_OUT = {"problems": 250, "samples": 4, "split": "test"}
WAYS = ("rl", "more", "own", "dpo")


def get_config() -> ml_collections.ConfigDict:
    """The pipeline; every field can be changed with --config.pipeline[N].FIELD=VALUE."""
    moe = stages.model(width=96, layers=3, experts=8)
    # What reinforcement itself is asked is kept small, since the others pay for it.
    brief = {"problems": 16, "samples": 1}
    more = stages.sft("more", moe, "@cold_start", "@cold_pairs", 1, 0)
    own = stages.sft("own", moe, "@cold_start", "@answers", 1, 0)
    dpo = stages.prefer("dpo", moe, "@cold_start", "@answers", 1, 0, rate=2e-4)
    asked = lambda name: stages.evaluate(f"{name}_asked", f"@{name}", TASK, HELD_OUT)
    return ml_collections.ConfigDict({
        "pipeline": (
            stages.pairs("cold_pairs", TASK, 8_000, 0),
            stages.sft("cold_start", moe, "", "@cold_pairs", 350, 0, rate=3e-3),
            stages.reinforce("rl", moe, "@cold_start", TASK, 100, 0, rate=2e-4, evaluation=brief),
            stages.spending(more, "rl"),
            stages.rejection("answers", "@cold_start", TASK, 2_000, 500, preferences=True),
            stages.spending(own, "rl", "answers"),
            stages.spending(dpo, "rl", "answers"),
            *map(asked, ("cold_start", *WAYS)),
        )
    })  # fmt: skip
