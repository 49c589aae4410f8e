"""Fills our leaves from a checkpoint's tensors, each device's part by itself.

A leaf is stacked of many tensors. Buffers are made for the parts that devices of this process hold,
every tensor is read once, and only if one of them needs it; then the buffers go to the devices. On
a CPU an aligned buffer becomes the array itself, so that nothing is held twice.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Shaped

from moejax.interop.quantized import Tensor
from moejax.interop.tables import Piece
from moejax.interop.tensors import copy

ALIGNMENT = 64


def place(
    pieces: Sequence[Piece],
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None,
) -> jax.Array:
    """One leaf, on its devices.

    Args:
      pieces: what it is made of.
      tensors: the checkpoint.
      shape: the leaf's shape.
      dtype: its type.
      sharding: where it lies; None is the default device.
    """
    if sharding is None:
        parts = {None: _Part.make(tuple(slice(0, size) for size in shape), dtype)}
    else:
        places = sharding.addressable_devices_indices_map(shape)
        of_device = {device: _bounds(index, shape) for device, index in places.items()}
        made: dict[tuple, _Part] = {}
        for bounds in of_device.values():
            key = tuple((part.start, part.stop) for part in bounds)
            made[key] = made.get(key) or _Part.make(bounds, dtype)
        parts = {
            device: made[tuple((part.start, part.stop) for part in bounds)]
            for device, bounds in of_device.items()
        }
    distinct = list({id(part): part for part in parts.values()}.values())
    for piece in pieces:
        wanted = [part for part in distinct if part.needs(piece)]
        if wanted:
            value = _as(tensors[piece.name].read(), dtype)
            value = piece.layout.load(value, piece.shape)
            for part in wanted:
                part.fill(piece, value)
    if sharding is None:
        array = jax.device_put(parts[None].buffer)
    else:
        arrays = [jax.device_put(part.buffer, device) for device, part in parts.items()]
        array = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    # Copies to an accelerator are done before the next leaf's buffers are made.
    return jax.block_until_ready(array)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A device's part of a leaf.

    Attributes:
      bounds: first and last index of every axis.
      buffer: its values.
    """

    bounds: tuple[slice, ...]
    buffer: Shaped[np.ndarray, "..."]

    @classmethod
    def make(cls, bounds: tuple[slice, ...], dtype: np.dtype) -> "_Part":
        shape = tuple(part.stop - part.start for part in bounds)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        room = np.empty(size + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        return cls(bounds, room[start : start + size].view(dtype).reshape(shape))

    def needs(self, piece: Piece) -> bool:
        """Whether some of the piece lies in this part."""
        return all(
            isinstance(at, slice) or part.start <= at < part.stop
            for at, part in zip(piece.index, self.bounds, strict=True)
        )

    def fill(self, piece: Piece, value: Shaped[np.ndarray, "..."]) -> None:
        """Writes the part's share of a piece; ``value`` has the buffer's type."""
        pairs = list(zip(piece.index, self.bounds, strict=True))
        target = tuple(at if isinstance(at, slice) else at - part.start for at, part in pairs)
        source = tuple(part for at, part in pairs if isinstance(at, slice))
        # An integer index alone would give a number instead of a view of it.
        copy(self.buffer[(*target, ...)], value[(*source, ...)])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _as(value: Shaped[np.ndarray, "..."], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    return value if value.dtype == dtype else value.astype(dtype)
