"""Every router that can be causal, as published, at equal training FLOPs.

Claims: learned token-choice routers beat a fixed choice, and the families differ by little.
DeepSeekMoE (arXiv 2401.06066, table 1), nats on the Pile at 2B parameters and 100B tokens: dense
2.060, hash layers 1.932, Switch 1.881, GShard 1.867, DeepSeekMoE 1.808. ReMoE (arXiv 2412.14711),
average accuracy: dense 38.20, no balancing 37.67, with a balance loss 39.67.

Each variant has its router's published options; where they differ:

- Steps of selection biases are ten times the published ones (SMEBU's too), for the short run.
- There is no shared expert, so that everything a layer does goes through its router: 16 experts of
  width 64, two active. Switch and Llama 4, which are defined for one, have 8 of width 128.
- gpt-oss's router, whose balancing is not published, has Switch's loss.
- LongCat's takes three of 24 choices, of which 16 have matrices: two, on average.
- The experts of autonomy have gates of rank 16, which score all experts for every token: 17 % more
  FLOPs, taken off its steps. Default vectors have the decay of the paper's top-2 runs.
- Top-p stops at four experts a token, to bound what a step costs.
- Of ``dynmoe``, ``remoe``, ``dselect_k``, ``top_p``, ``gshard``, ``expert_threshold``,
  ``moe_plus_plus`` and ``longcat`` a token's experts are known only after it ran: their budget is
  planned by what they aim at, their bill counts what ran, and the loss stands beside the FLOPs
  really spent. ReMoE and DSelect-k start with half and with all of the experts on.

Left out: routers by competition among tokens, which leak (see ``LEAKING``), and those that only
measure speed (``MEASURING``).

What it can show: which routers fail or lag at this size, and by how much they load experts
unevenly. What it cannot: a ranking of the good ones, which Holm's correction over 35 comparisons
does not allow at five seeds unless they are far apart. ``hash`` gains from under-training: a
token's id is a good feature early.

    moejax ablate --config=experiments/ablations/router_shootout.py --workdir=runs/router_shootout

Found (results/ablations/router_shootout): half of it. A random choice is worse than the learned
softmax by 0.041 bits per byte (0.033 to 0.048), as it must be; a hash of the token is not: 0.006
better, not told apart (-0.014 to +0.002). Of 35 routers 15 are told apart, all worse; 20 are not,
among them Mixtral's, GShard's, Switch's, gpt-oss's, top-p and MoE++. Those whose published options
multiply the gates are worse almost in the order of the factor, 1.5 to 16.

Hardware: 2 CPU cores, about an hour with --processes=2; three fifths of that with
--config.seeds=[0,1,2]. The learning rate is the base's for all.
"""

from typing import Any

from base import ablation

# They let later tokens change earlier outputs in training, so that losses are no language model's.
LEAKING = ("expert_choice", "base_layers", "s_base", "soft_moe", "mixture_of_depths")
# They choose by wanted loads, not by tokens.
MEASURING = ("force_balanced", "trace")

TOP_2 = {"moe": {"num_experts": 16, "top_k": 2, "d_expert": 64}, "router": {"name": "softmax_topk"}}
TOP_1 = {"moe.num_experts": 8, "moe.top_k": 1, "moe.d_expert": 128}
AS_PUBLISHED = (
    "softmax_topk", "mixtral", "deepseek_moe", "deepseek_v2", "global_batch", "simbal",
    "expert_coupling", "top_k", "quantile", "noisy_top_k", "vmoe", "gshard", "moge", "sparsemixer",
    "x_moe", "remoe", "dselect_k", "expert_threshold", "moe_plus_plus", "hash", "random",
)  # fmt: skip
WITH_BIAS = ("deepseek_v3", "deepseek_v4", "kimi_k2", "loss_free", "centred_bias", "ernie")


def router(name: str, **options: Any) -> dict[str, Any]:
    """The edit that sets a router with its published options, but for those given."""
    return {"router": {"name": name, **options}}


def variants() -> dict[str, dict[str, Any]]:
    """A variant for each router, by its name."""
    found = {name: router(name) for name in AS_PUBLISHED}
    found |= {name: router(name, bias_step=0.01) for name in WITH_BIAS}
    found["smebu"] = router("smebu", bias_step=0.005)
    found["longcat"] = {**router("longcat", bias_step=0.01), "moe.top_k": 3}
    found["gpt_oss"] = router("gpt_oss", balance_loss_weight=0.01)
    found["default_vector"] = router("default_vector", decay=0.95)
    found["top_p"] = router("top_p", max_experts=4)
    found["dynmoe"] = router("dynmoe")
    found["autonomy"] = {**router("autonomy"), "moe.gate_rank": 16}
    found["switch"] = {**router("switch"), **TOP_1}
    found["llama4"] = {**router("llama4"), **TOP_1}
    return found


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "router_shootout",
        base=TOP_2,
        variants=variants(),
        reference="softmax_topk",
        hold="flops",
        claim={
            "text": "Learned token-choice routers beat a hash of the token and a random choice.",
            "source": "DeepSeekMoE, arXiv 2401.06066, table 1",
            "direction": None,
            "numbers": "hash 1.932, Switch 1.881, GShard 1.867, DeepSeekMoE 1.808 nats on the Pile",
        },
    )
