"""Random draws that are the same on every machine and with every version of NumPy.

NumPy promises equal bits of its bit generators, but not of ``Generator``'s methods; a task's
instances are named by (seed, index), and must outlive both. So a draw is a counter hashed.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def _encoded(parts: tuple[Any, ...]) -> bytes:
    return "\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()


def fraction_of(*parts: str | int) -> float:
    """A number in [0, 1) that only the parts decide."""
    digest = hashlib.blake2b(_encoded(parts), digest_size=8, person=b"moejax split").digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


class Draws:
    """A stream of uniform draws, decided by the parts of its key."""

    def __init__(self, *key: str | int):
        self._key = hashlib.blake2b(_encoded(key), person=b"moejax draws").digest()
        self._count, self._left = 0, b""

    def _bytes(self, count: int) -> bytes:
        while len(self._left) < count:
            block = self._count.to_bytes(8, "big")
            self._left += hashlib.blake2b(block, key=self._key, person=b"moejax draws").digest()
            self._count += 1
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high], both included; off by less than 2**-64."""
        span = high - low + 1
        if span < 1:
            raise ValueError(f"no integer lies in [{low}, {high}]")
        count = (span.bit_length() + 7) // 8 + 8
        return low + int.from_bytes(self._bytes(count), "big") % span

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in a random order (Fisher and Yates)."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = self.integer(0, last)
            items[last], items[other] = items[other], items[last]
        return items

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """So many different ones of the items, in random order."""
        return self.shuffled(items)[:count]

    def chance(self, percent: int) -> bool:
        """True in so many of a hundred cases."""
        return self.integer(0, 99) < percent
