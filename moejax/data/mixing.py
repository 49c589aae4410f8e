"""How rows of several sources are mixed: shares by weight and temperature, and an exact schedule.

grain's own ``MapDataset.mix`` draws at random access and without randomness as well, but rounds
weights to 1 % of the smallest one (1 : 1.009 becomes 1 : 1); so the schedule is here, in whole
numbers, and grain's ``select_from_datasets`` follows it.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np

from moejax.data.packing import Row, Rows

_WHOLE = 2**53  # what shares are counted in


def shares(weights: Sequence[float], temperature: float = 1.0) -> list[float]:
    """The share of each source: ``weight ** (1 / temperature)``, normalised.

    So languages are sampled in Arivazhagan et al. 2019 (arXiv 1907.05019: p ** (1 / T), T = 5) and
    in mT5 (Xue et al. 2021, arXiv 2010.11934: |L| ** alpha with alpha = 1 / T = 0.3).

    Args:
      weights: above zero.
      temperature: T; 1 keeps the weights, and towards infinity all shares become equal.
    """
    largest = max(weights)
    tempered = [(weight / largest) ** (1.0 / temperature) for weight in weights]
    total = math.fsum(tempered)
    return [value / total for value in tempered]


class Schedule:
    """Which source each row is from, and the how-many-eth of that source it is.

    A nested Bresenham walk in whole numbers: the largest source takes its part of all rows, the
    next one its part of what is left, and so on. What the first N rows hold of a source can so be
    told without walking through them, and it is off N x share by less than one row more, and by
    less than ``1 + 1/2 + ... + 1/(S - 1)`` rows fewer, for S sources: less than one row with two
    of them, less than three with ten, however large N is.

    Args:
      parts: of the sources, above zero; their proportions are kept to 2**-53 of the whole.

    Raises:
      ValueError: a part too small to be drawn at all.
    """

    def __init__(self, parts: Sequence[float]):
        total = math.fsum(parts)
        self.parts = [round(part / total * _WHOLE) for part in parts]
        if not all(part > 0 for part in self.parts):
            raise ValueError(f"a part below 2**-53 of the whole: {min(parts) / total:g}")
        self._order = sorted(range(len(parts)), key=lambda i: -self.parts[i])

    def __len__(self) -> int:
        return sys.maxsize  # endless, as grain writes it

    def counts(self, rows: int) -> list[int]:
        """Rows of each source among the first ``rows``."""
        counts, left, remaining = [0] * len(self.parts), rows, sum(self.parts)
        for source in self._order:
            rest = left * (remaining - self.parts[source]) // remaining
            counts[source] = left - rest
            left, remaining = rest, remaining - self.parts[source]
        return counts

    def __getitem__(self, row: int) -> tuple[int, int]:
        """Source of a row, and how many rows of that source came before it."""
        left, more, remaining = row, row + 1, sum(self.parts)
        for source in self._order:
            others = remaining - self.parts[source]
            rest, rest_more = left * others // remaining, more * others // remaining
            if left - rest != more - rest_more:
                return source, left - rest
            left, more, remaining = rest, rest_more, others
        raise AssertionError("each row is of some source")


class MixedRows:
    """The training rows of several sources as one sequence, source after source.

    Rows are numbered through all sources; ``schedule`` says from which of them each row of a run
    comes, so that the sources' shares are of tokens: a source whose rows hold more padding is given
    more rows.

    Attributes:
      seq_len: S.
      targets: (input, target) pairs in all rows together.
      parts: the rows of each source.
      starts: number of each source's first row, and at the end the number of all rows.
      schedule: of the sources' rows.
      tokens_per_row: targets of a row as the schedule draws them, on the average.
    """

    def __init__(self, parts: Sequence[Rows], token_shares: Sequence[float]):
        """Takes the packed rows of each source and its share of the tokens.

        Raises:
          ValueError: a share too small to be drawn at all.
        """
        self.parts, self.seq_len = tuple(parts), parts[0].seq_len
        self.starts = np.cumsum([0, *(len(rows) for rows in parts)])
        self.targets = sum(rows.targets for rows in parts)
        row_shares = [
            share / rows.tokens_per_row for share, rows in zip(token_shares, parts, strict=True)
        ]
        self.schedule = Schedule(row_shares)
        self.tokens_per_row = math.fsum(token_shares) / math.fsum(row_shares)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Row:
        """As ``Rows``; raises IndexError where there is no such row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[source][index - int(self.starts[source])]

    def epochs(self, rows: int) -> list[float]:
        """How often each source has been gone through when ``rows`` rows were drawn."""
        counts = self.schedule.counts(rows)
        return [count / len(part) for count, part in zip(counts, self.parts, strict=True)]
