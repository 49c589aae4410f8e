"""Llama 3.1 8B, 70B and 405B: GPU-hours and emissions of the model card, FLOPs of the paper.

moejax plan --published=llama3_1 prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["llama3_1"]()
