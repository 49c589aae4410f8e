"""DeepSeek-V2: 172.8K H800 hours a trillion tokens, beside DeepSeek 67B's 300.6K."""

from moejax.cost.counts import count
from moejax.cost.published.figures import Bill, Figure, implied_mfu, train_flops
from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig
from moejax.models.presets import PRESETS

PAPER = "arXiv 2405.04434"
TOKENS, LENGTH = 8.1e12, 4096
HOURS_A_TRILLION, HOURS_67B = 172.8e3, 300.6e3
CACHE_BITS = 6  # of a cached value in deployment, on average (section 3.2.3); 16 in DeepSeek 67B

# arXiv 2401.02954, table 2.
DEEPSEEK_67B = ModelConfig(
    102400, 8192, 95, 22016, attention=AttentionConfig(64, 8, 128), tie_embeddings=False
)


def bill() -> Bill:
    """The bill of pre-training."""
    model = PRESETS["deepseek_v2"]
    counted = count(model, LENGTH)
    cache, dense = counted.kv_cache_bytes_per_token, count(DEEPSEEK_67B, 1).kv_cache_bytes_per_token
    flops = train_flops(model, LENGTH)
    config = "counted from its config"
    return Bill(
        "deepseek_v2",
        "DeepSeek-V2, 236B parameters, 21B a token",
        (PAPER, "arXiv 2505.09343 (ISCA 2025)"),
        ("8.1T tokens in rows of 4,096", "H800 SXM, 172.8K hours a trillion tokens"),
        (
            Figure("parameters", "", 236e9, counted.params.total, "derived", config, PAPER, 0.005),
            Figure("active parameters", "", 21e9, counted.params.active.with_head, "derived",
                   f"{config}, with head", PAPER, 0.02),
            Figure("training FLOPs a token", "FLOP", 155e9, flops, "derived",
                   "causal, length 4,096", "arXiv 2505.09343, table 2", 0.005),
            Figure("KV cache less than DeepSeek 67B's", "%", 93.3,
                   100 * (1 - cache / dense * CACHE_BITS / 16), "derived",
                   f"{cache:,} B at 6 of 16 bits, against {dense:,}", f"{PAPER}, abstract"),
            Figure("training cost less than DeepSeek 67B's", "%", 42.5,
                   100 * (1 - HOURS_A_TRILLION / HOURS_67B), "echoed",
                   "172.8K against 300.6K hours", f"{PAPER}, abstract"),
            Figure("pre-training, all tokens", "GPU-hours", None, 8.1 * HOURS_A_TRILLION,
                   "implied", "8.1 x 172.8K hours", "counted"),
            Figure("utilisation", "%", None,
                   100 * implied_mfu(1e12 * flops, "h800_sxm", HOURS_A_TRILLION), "implied",
                   "FLOPs over 172.8K hours of the peak", "counted"),
        ),
    )  # fmt: skip
