"""Multi-head latent attention against grouped queries, at equal training FLOPs.

Claim: MLA is better than full multi-head attention with a fraction of its cache, where grouped and
multi queries lose. DeepSeek-V2 (arXiv 2405.04434, appendix): MMLU of 7B dense models with MHA, GQA
of eight groups and MQA 45.2, 41.2 and 37.9; MLA against MHA better on three of four hard benchmarks
at both MoE sizes, with 15.6K against 110.6K cached elements a token (small) and 34.6K against
860.2K (large).

Four heads of 16 channels: MHA caches 128 values a layer and token, GQA with two key/value heads 64,
MQA 32, and MLA, whose latent has 16 channels beside 8 that turn, 24. MLA's FLOPs a token are MHA's
within 1 %; GQA and MQA need 6 and 9 % fewer and get 7 and 10 % more steps.

What it can show: whether a small cache costs loss at equal FLOPs. What it cannot: heads of 16
channels are no model of heads of 128, and 128 positions are no long context.

    moejax ablate --config=experiments/ablations/mla_vs_gqa.py --workdir=runs/mla_vs_gqa

Found (results/ablations/mla_vs_gqa): disagrees. At equal FLOPs GQA and MQA end 0.009 bits per byte
below full attention (0.002 to 0.016), told apart, and MLA 0.038 above (0.031 to 0.045). Fewer
key/value heads leave FLOPs for 7 and 10 % more steps, which count at 0.6M tokens; a latent of 16
channels is small for four heads of 16.

Hardware: 2 CPU cores, about 12 minutes with --processes=2.
"""

from typing import Any

from base import TUNING, ablation

MLA = {"num_heads": 4, "kind": "mla", "kv_lora_rank": 16, "nope_head_dim": 16, "rope_head_dim": 8,
       "v_head_dim": 16}  # fmt: skip


def get_config() -> dict[str, Any]:
    """The ablation's config; every field can be changed with --config.FIELD=VALUE."""
    return ablation(
        "mla_vs_gqa",
        base={"model.attention": {"num_heads": 4}},
        variants={
            "mha": {},
            "gqa": {"model.attention.num_kv_heads": 2},
            "mqa": {"model.attention.num_kv_heads": 1},
            "mla": {"model.attention": MLA},
        },
        reference="mha",
        hold="flops",
        tuning=TUNING,
        claim={
            "text": "MLA is no worse than multi-head attention, with a far smaller cache; GQA and "
            "MQA are worse.",
            "source": "DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix",
            "direction": "mla",
            "numbers": "MMLU of MHA, GQA, MQA 45.2, 41.2, 37.9; cache 34.6K against 860.2K",
        },
    )
