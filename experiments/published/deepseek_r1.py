"""DeepSeek-R1: what came on top of V3, R1-Zero included. No ablations, no earlier runs.

moejax plan --published=deepseek_r1 prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["deepseek_r1"]()
