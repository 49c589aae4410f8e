"""How much more a model costs than the runs that became it: what developers measured."""

import dataclasses

from moejax.config import check


@dataclasses.dataclass(frozen=True)
class Development:
    """A project's research, ablations and failed runs, beside its final runs.

    Attributes:
      project: whose.
      multiplier: everything over the final runs.
      measured: of what, in the source's words or close to them.
      source: the paper.
    """

    project: str
    multiplier: float
    measured: str
    source: str


MEASURED = (
    Development("OLMo and OLMo 2", 1.5, "development 50 % of that of training, by impact",
                "arXiv 2503.05804, abstract"),
    Development("Olmo 3", 1 / (1 - 0.822), "development 82.2 % of all compute",
                "arXiv 2605.01158, abstract"),
)  # fmt: skip


def all_in(headline_dollars: float, multiplier: float, failed_share: float = 0.0) -> float:
    """What a project cost if it was developed as another was, and some of its time was lost.

    Args:
      headline_dollars: of the runs that became the model, without anything lost.
      multiplier: everything over the final runs.
      failed_share: of all device-hours, those of steps that were redone or never used, 0 to
        below 1.

    Raises:
      ConfigError: a multiplier below 1, or a share out of range.
    """
    check(multiplier >= 1, "multiplier", multiplier, "must be at least 1")
    check(0 <= failed_share < 1, "failed_share", failed_share, "must be from 0 to below 1")
    return headline_dollars * multiplier / (1 - failed_share)
