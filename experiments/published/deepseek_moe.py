"""DeepSeekMoE 16B beside LLaMA2 7B: FLOPs of 4,096 tokens, forward and backward.

moejax plan --published=deepseek_moe prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["deepseek_moe"]()
