"""DeepSeek-R1-Zero: reinforcement learning on V3's base, on 512 H800.

moejax plan --published=deepseek_r1_zero prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["deepseek_r1_zero"]()
