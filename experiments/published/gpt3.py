"""GPT-3 175B: FLOPs of its paper, and the energy that others reckoned from a measured rate.

moejax plan --published=gpt3 prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["gpt3"]()
