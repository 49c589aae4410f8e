"""OLMoE-1B-7B: 5.1T tokens on 256 H100 for about ten days.

moejax plan --published=olmoe prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["olmoe"]()
