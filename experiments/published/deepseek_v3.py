"""DeepSeek-V3: the "$5.6 million" of its technical report, and its run as measured later.

moejax plan --published=deepseek_v3 prints it; --published=FILE takes a file of this form.
"""

from moejax.cost.published import BILLS, Bill


def get_bill() -> Bill:
    """The bill: inputs, sources, and each figure as published and as moejax computes it."""
    return BILLS["deepseek_v3"]()
