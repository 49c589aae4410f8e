"""How a tensor of a checkpoint lies in ours: reversible changes of layout, one class each.

Each knows the stored shape from ours, so that a wrong shape is found before anything is read. They
move bits and compute nothing; all work on views of any type. Stored matrices are (out, in).
"""

import dataclasses
import math
from typing import Protocol

import numpy as np
from jaxtyping import Shaped

Shape = tuple[int, ...]


class Layout(Protocol):
    """A reversible change of layout."""

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape in the file of a tensor of ours."""

    def load(self, stored: Shaped[np.ndarray, "..."], shape: Shape) -> Shaped[np.ndarray, "..."]:
        """Ours, of this shape, from the file's."""

    def save(self, ours: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The file's from ours."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix (out, in), ours with inputs first and both sides split: (inputs ..., outputs ...).

    Attributes:
      inputs: how many of our axes are inputs.
      turned: that many of the last axis's last channels are rotary and stored as pairs
        (2i, 2i + 1); ours are halves (i, i + turned / 2).
    """

    inputs: int = 1
    turned: int = 0

    def stored_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def load(self, stored: Shaped[np.ndarray, "..."], shape: Shape) -> Shaped[np.ndarray, "..."]:
        return halves(stored.T.reshape(shape), self.turned)

    def save(self, ours: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        columns = math.prod(ours.shape[self.inputs :])
        return pairs(ours, self.turned).reshape(-1, columns).T


@dataclasses.dataclass(frozen=True)
class Vector:
    """A vector, ours split into axes; ``turned`` as for ``Linear``."""

    turned: int = 0

    def stored_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def load(self, stored: Shaped[np.ndarray, "..."], shape: Shape) -> Shaped[np.ndarray, "..."]:
        return halves(stored.reshape(shape), self.turned)

    def save(self, ours: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        return pairs(ours, self.turned).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The same axes in another order: axis i of ours is axis ``order[i]`` of the file's.

    Without an order the tensor is the same. With ``split``, that axis of the file's is split first
    into two of ``parts`` sizes, one of them 2 (gate and up); -1 stands for the rest.
    """

    order: tuple[int, ...] = ()
    split: int | None = None
    gate_first: bool = True

    def stored_shape(self, shape: Shape) -> Shape:
        if self.order:
            shape = tuple(shape[self.order.index(i)] for i in range(len(shape)))
        if self.split is None:
            return shape
        at = self.split
        return (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])

    def load(self, stored: Shaped[np.ndarray, "..."], shape: Shape) -> Shaped[np.ndarray, "..."]:
        if self.split is not None:
            at = self.split
            parts = (2, -1) if self.gate_first else (-1, 2)
            stored = stored.reshape(*stored.shape[:at], *parts, *stored.shape[at + 1 :])
        return stored.transpose(self.order) if self.order else stored

    def save(self, ours: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        shape = self.stored_shape(ours.shape)
        if self.order:
            ours = ours.transpose([self.order.index(i) for i in range(ours.ndim)])
        return ours.reshape(shape)


STRIP = 16

SAME = Axes()
LINEAR = Linear()
VECTOR = Vector()


def copy(target: Shaped[np.ndarray, "*s"], source: Shaped[np.ndarray, "*s"]) -> None:
    """target[...] = source, of one type; by narrow strips where the source is transposed.

    NumPy walks a transposed matrix row by row and misses the cache at every number. Strips of the
    last axis are 2 to 6 times as fast.
    """
    bits = np.dtype(f"u{target.dtype.itemsize}")  # NumPy is slow with types that it does not know
    target, source = target.view(bits), source.view(bits)
    if source.ndim < 2 or source.strides[-1] == min(source.strides):
        target[...] = source
        return
    for start in range(0, source.shape[-1], STRIP):
        target[..., start : start + STRIP] = source[..., start : start + STRIP]


def halves(array: Shaped[np.ndarray, "*s d"], turned: int) -> Shaped[np.ndarray, "*s d"]:
    """The last ``turned`` channels from pairs to halves."""
    return _reorder(array, turned, lambda n: np.arange(n).reshape(-1, 2).T.reshape(-1))


def pairs(array: Shaped[np.ndarray, "*s d"], turned: int) -> Shaped[np.ndarray, "*s d"]:
    """The last ``turned`` channels from halves to pairs."""
    return _reorder(array, turned, lambda n: np.arange(n).reshape(2, -1).T.reshape(-1))


def _reorder(array, turned, order):
    if not turned:
        return array
    first = array.shape[-1] - turned
    return array[..., np.concatenate([np.arange(first), first + order(turned)])]
