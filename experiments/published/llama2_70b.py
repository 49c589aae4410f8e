"""Llama 2 70B: A100 hours and emissions.

moejax plan --published=llama2_70b prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["llama2_70b"]()
