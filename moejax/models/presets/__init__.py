"""Published models as plain values of ModelConfig, one file a family, and a lookup by name.

Every field that decides a parameter, a FLOP, a cache byte or a logit is the released checkpoint's
own: the values of its ``config.json``, not a class's defaults. What cannot be read there, losses
and initial deviations, is the paper's; where neither says it, the file says so. Contexts are those
of the release, so the rotary embedding is the one after context extension.

Each file names its sources. "Copy of the config" means that the released ``config.json`` was read
as it is kept in a public repository (NVIDIA's aiconfigurator keeps many), "hub" that the values
are those published there but no such copy was at hand to compare with.
"""

from moejax.models.model_config import ModelConfig
from moejax.models.presets import deepseek, glm, gpt_oss, kimi, llama, mixtral, olmoe, qwen

PRESETS: dict[str, ModelConfig] = {
    "deepseek_moe_16b": deepseek.deepseek_moe_16b,
    "deepseek_r1": deepseek.deepseek_v3,
    "deepseek_r1_zero": deepseek.deepseek_v3,
    "deepseek_v2": deepseek.deepseek_v2,
    "deepseek_v2_lite": deepseek.deepseek_v2_lite,
    "deepseek_v3": deepseek.deepseek_v3,
    "glm4_5": glm.glm4_5,
    "glm4_5_air": glm.glm4_5_air,
    "gpt_oss_120b": gpt_oss.gpt_oss_120b,
    "gpt_oss_20b": gpt_oss.gpt_oss_20b,
    "kimi_k2": kimi.kimi_k2,
    "llama3_1_405b": llama.llama3_1_405b,
    "llama3_1_70b": llama.llama3_1_70b,
    "llama3_1_8b": llama.llama3_1_8b,
    "mixtral_8x7b": mixtral.mixtral_8x7b,
    "olmoe_1b_7b": olmoe.olmoe_1b_7b,
    "qwen1_5_moe_a2_7b": qwen.qwen1_5_moe_a2_7b,
    "qwen2_57b_a14b": qwen.qwen2_57b_a14b,
    "qwen2_5_72b": qwen.qwen2_5_72b,
    "qwen3_0_6b": qwen.qwen3_0_6b,
    "qwen3_14b": qwen.qwen3_14b,
    "qwen3_1_7b": qwen.qwen3_1_7b,
    "qwen3_235b_a22b": qwen.qwen3_235b_a22b,
    "qwen3_30b_a3b": qwen.qwen3_30b_a3b,
    "qwen3_32b": qwen.qwen3_32b,
    "qwen3_4b": qwen.qwen3_4b,
    "qwen3_8b": qwen.qwen3_8b,
}
