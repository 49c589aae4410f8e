"""The base run with twenty seeds: noise that is real, for a check of the verdicts.

Claim: none about models. Few seeds hide how much a result depends on them (Bouthillier et al.,
arXiv 2103.03098). Dealt out to pretended variants, again and again, these runs say how often
`moejax ablate` would tell apart what does not differ; it promises at most 5 %:

    moejax ablate --config=experiments/ablations/base_seeds.py --workdir=runs/base_seeds
    python experiments/launch/check_statistics.py --runs=runs/base_seeds

The second variant, half as wide and two layers deep, is here because an ablation has two.

What it can show: whether errors of this size of run are as the statistics take them.
What it cannot: errors of runs that diverge now and then.

Hardware: 2 CPU cores, about 12 minutes with --processes=2.
"""

from typing import Any

from base import ablation


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return {
        **ablation(
            "base_seeds",
            variants={"base": {}, "small": {"model.d_model": 32, "model.num_layers": 2}},
            reference="base",
            hold="tokens",
            claim={
                "text": "None: twenty seeds of one run, to check the verdicts with.",
                "source": "Bouthillier et al., arXiv 2103.03098",
                "direction": None,
                "numbers": "none",
            },
        ),
        "seeds": list(range(20)),
    }
