"""Families of checkpoints, one table each. Adding one is a table, a config mapping, a line here."""

from moejax.config import nearest
from moejax.interop.families.deepseek import DEEPSEEK_MOE, DEEPSEEK_V2, DEEPSEEK_V3
from moejax.interop.families.family import Family
from moejax.interop.families.glm import GLM4_MOE
from moejax.interop.families.gpt_oss import GPT_OSS
from moejax.interop.families.llama import LLAMA, QWEN2, QWEN3
from moejax.interop.families.mixtral import MIXTRAL, OLMOE
from moejax.interop.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from moejax.interop.fields import Fields

# In the order in which one is looked for that can hold a model trained here.
FAMILIES = (
    LLAMA, QWEN2, QWEN3, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_MOE, DEEPSEEK_V2,
    DEEPSEEK_V3, GLM4_MOE, GPT_OSS,
)  # fmt: skip

BY_TYPE = {name: family for family in FAMILIES for name in (family.model_type, *family.also)}


def find(fields: Fields) -> Family:
    """The family that a config.json names; raises UserError for one that is not known."""
    name = fields.get("model_type", str)
    fields.check(
        name in BY_TYPE, "model_type", f"moejax reads no such model; {nearest(name, BY_TYPE)}"
    )
    return BY_TYPE[name]


__all__ = ["BY_TYPE", "FAMILIES", "Family", "find"]
