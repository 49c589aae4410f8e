"""DeepSeek-V2: 172.8K H800 hours a trillion tokens, beside DeepSeek 67B's 300.6K.

moejax plan --published=deepseek_v2 prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["deepseek_v2"]()
