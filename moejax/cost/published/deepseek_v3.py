"""DeepSeek-V3: the "$5.6 million" of its technical report, and its run as measured later.

The 5.576M are the official training only; the report itself leaves out research and ablations.
"""

from moejax.cost.counts import count
from moejax.cost.published.figures import Bill, Figure, hours, implied_mfu, train_flops
from moejax.models.presets import PRESETS

REPORT = "arXiv 2412.19437, table 1"
ISCA = "arXiv 2505.09343 (ISCA 2025)"
GPUS, TOKENS, RATE, MFU = 2048, 14.8e12, 2.0, 0.3894
BATCH, LENGTH = 15_360, 4096
DAY = 86400
# Rows, positions and steps of the two stages of context extension (section 4.3).
EXTENSION = ((1920, 32_768, 1000), (480, 131_072, 1000))
EXTENSION_HOURS, POST_TRAINING_HOURS, REPORTED_HOURS = 119e3, 5e3, 2.664e6


def flops_per_token() -> float:
    """Training FLOPs as its authors count them: causal attention, no MTP."""
    return train_flops(PRESETS["deepseek_v3"], LENGTH)


def bill() -> Bill:
    """The bill of pre-training, context extension and post-training."""
    return Bill(
        "deepseek_v3",
        "DeepSeek-V3, 671B parameters, 37B a token",
        ("arXiv 2412.19437", ISCA),
        ("14.8T tokens in rows of 4,096", "2,048 H800 SXM, 989.4 TFLOP/s dense BF16", "$2 an hour",
         "38.94 % of the peak by causal FLOPs without MTP (ISCA 2025, table 4)"),
        (*_model(), *_pre_training(), *_speed(), *_echoes()),
    )  # fmt: skip


def _model() -> tuple[Figure, ...]:
    counted = count(PRESETS["deepseek_v3"], LENGTH)
    cache = lambda name: count(PRESETS[name], LENGTH).kv_cache_bytes_per_token
    config = "counted from its config"
    return (
        Figure("parameters", "", 671e9, counted.params.total, "derived", config, REPORT, 0.005),
        Figure("active parameters", "", 37e9, counted.params.active.with_head, "derived",
               f"{config}, with head", REPORT, 0.02),
        Figure("training FLOPs a token", "FLOP", 250e9,
               flops_per_token(), "derived",
               "causal, without MTP, length 4,096", f"{ISCA}, table 2", 0.005),
        Figure("KV cache a token", "B", 70_272, cache("deepseek_v3"), "derived",
               "61 layers x (512 + 64) x 2 bytes", f"{ISCA}, table 1", 0.0),
        Figure("KV cache, Qwen2.5-72B", "B", 327_680, cache("qwen2_5_72b"), "derived",
               "80 layers x 2 x 8 heads x 128 x 2 bytes", f"{ISCA}, table 1", 0.0),
        Figure("KV cache, Llama-3.1-405B", "B", 516_096, cache("llama3_1_405b"), "derived",
               "126 layers x 2 x 8 heads x 128 x 2 bytes", f"{ISCA}, table 1", 0.0),
        Figure("FLOPs a token, Llama-3.1-405B", "FLOP", 2448e9,
               train_flops(PRESETS["llama3_1_405b"], LENGTH), "derived",
               "causal, length 4,096", f"{ISCA}, table 2", 0.01,
               "2,448 is moejax's count at length 2,048, where scores cost half"),
    )  # fmt: skip


def _pre_training() -> tuple[Figure, ...]:
    flops = TOKENS * flops_per_token()
    taken = hours(flops, "h800_sxm", MFU)
    a_trillion = taken / TOKENS * 1e12
    return (
        Figure("pre-training", "GPU-hours", REPORTED_HOURS, taken, "derived",
               "tokens x FLOPs over 38.94 % of the peak", REPORT),
        Figure("pre-training, a trillion tokens", "GPU-hours", 180e3, a_trillion, "derived",
               "the same of 1T tokens", REPORT),
        Figure("days, a trillion tokens", "days", 3.7, a_trillion / GPUS / 24, "derived",
               "on 2,048 GPUs", "arXiv 2412.19437, section 1"),
        Figure("days, all tokens", "days", None, taken / GPUS / 24, "implied",
               "on 2,048 GPUs", "counted"),
        Figure("pre-training, dollars", "USD", 5.328e6, RATE * taken, "derived",
               "hours x $2", REPORT),
        Figure("utilisation by the report's hours", "%", None,
               100 * implied_mfu(flops, "h800_sxm", REPORTED_HOURS), "implied",
               "FLOPs over 2,664K hours of the peak", "counted"),
    )  # fmt: skip


def _speed() -> tuple[Figure, ...]:
    """The measured run, each figure from another one of the same table."""
    per_token = flops_per_token()
    a_day, rate = 272.80e9, 385e12
    per_gpu = a_day / DAY / GPUS
    table = f"{ISCA}, table 4"
    return (
        Figure("TFLOP/s a GPU, causal", "TFLOP/s", 385, per_token * per_gpu / 1e12, "derived",
               "272.80B tokens a day x FLOPs", table),
        Figure("MFU, causal", "%", 38.94, 100 * rate / 989.4e12, "derived",
               "385 over 989.4 TFLOP/s", table),
        Figure("tokens a day", "", a_day, rate * GPUS * DAY / per_token, "derived",
               "385 TFLOP/s x 2,048 over FLOPs", table),
        Figure("seconds a step", "s", 19.926, BATCH * LENGTH / (a_day / DAY), "derived",
               "15,360 x 4,096 tokens at 272.80B a day", table),
    )  # fmt: skip


def _echoes() -> tuple[Figure, ...]:
    extended = sum(
        rows * length * steps * train_flops(PRESETS["deepseek_v3"], length)
        for rows, length, steps in EXTENSION
    )
    total = REPORTED_HOURS + EXTENSION_HOURS + POST_TRAINING_HOURS
    return (
        Figure("context extension, dollars", "USD", 0.238e6, RATE * EXTENSION_HOURS, "echoed",
               "119K hours x $2", REPORT),
        Figure("post-training, dollars", "USD", 0.01e6, RATE * POST_TRAINING_HOURS, "echoed",
               "5K hours x $2", REPORT),
        Figure("all stages", "GPU-hours", 2.788e6, total, "echoed",
               "2,664K + 119K + 5K hours", REPORT),
        Figure("all stages, dollars", "USD", 5.576e6, RATE * total, "echoed",
               "2,788K hours x $2", REPORT),
        Figure("utilisation of context extension", "%", None,
               100 * implied_mfu(extended, "h800_sxm", EXTENSION_HOURS), "implied",
               "126B tokens at 32K and 128K, 119K hours", "counted"),
    )  # fmt: skip
