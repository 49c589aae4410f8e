"""Safetensors files: checked by the library, read tensor by tensor, and written as a stream.

The library proves a file whole (header, offsets, length) when it opens it. The bytes themselves are
read at the header's offsets, not through the library's memory map: pages of a map would count
beside the arrays they were copied to, and NumPy has no names for the 8-bit types. Nothing is ever
unpickled.
"""

import dataclasses
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from moejax.config import UserError
from moejax.interop.fields import read_json
from moejax.interop.tensors import copy

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download or copy it again"

# Names of the format's types.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
      file: where it stands.
      dtype: its type.
      shape: its shape.
      offset: its first byte in the file.
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The tensor, in memory of its own; raises UserError where the file ends early."""
        array = np.empty(self.shape, self.dtype)
        left = memoryview(array.reshape(-1).view(np.uint8))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                count = file.readinto(left)
                if not count:
                    raise UserError(f"{str(self.file)!r}: ends too early; {AGAIN}")
                left = left[count:]
        return array


def read_header(file: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a file, proved whole by the library.

    Raises:
      UserError: missing, truncated or damaged, or with a type that is not known here.
    """
    try:
        with safe_open(file, framework="np"):
            pass
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
    except FileNotFoundError:
        raise UserError(f"{str(file)!r}: no such file; {AGAIN}") from None
    except (OSError, ValueError, struct.error, SafetensorError) as error:
        raise UserError(
            f"{str(file)!r}: truncated or damaged safetensors file ({error}); {AGAIN}"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{str(file)!r}: tensor {name} has type {entry['dtype']}, which moejax does not "
                "read; convert the checkpoint to BF16"
            )
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return tensors


def open_checkpoint(folder: pathlib.Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, in one file or in shards with an index.

    Raises:
      UserError: no safetensors, an index without its shards or tensors, or a damaged file.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return read_header(folder / SINGLE)
        raise UserError(_no_weights(folder))
    weight_map = read_json(index, AGAIN).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(
        isinstance(shard, str) and shard == pathlib.PurePath(shard).name
        for shard in weight_map.values()
    ):
        raise UserError(f"{str(index)!r}: has no weight_map from tensors to files; {AGAIN}")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{str(folder / shard)!r}: shard named by {INDEX} is missing; {AGAIN}")
        shards[shard] = read_header(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise UserError(
                f"{str(folder / shard)!r}: holds no tensor {name}, which {INDEX} says; {AGAIN}"
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _no_weights(folder: pathlib.Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f"{str(folder / pickles[0])!r}: pickled weights, which moejax never opens since they "
            "can run code; get the model's safetensors, or convert it with Transformers"
        )
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"{str(folder / INDEX)!r}: no such file beside {shards[0]}; {AGAIN}"
    return f"{str(folder)!r}: holds no {SINGLE} and no {INDEX}; give a model's folder"


class ShardWriter:
    """Writes tensors into shards in any order; each goes straight to its place on the disk.

    Args:
      folder: an empty folder.
      tensors: name, type and shape of every tensor, in the order of the files.
      max_shard_bytes: a shard takes no further tensor beyond this.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
        max_shard_bytes: int,
    ):
        shards: list[dict[str, tuple[np.dtype, tuple[int, ...], int]]] = [{}]
        filled = self._total = 0
        for name, dtype, shape in tensors:
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = (dtype, shape, filled)
            filled += size
            self._total += size
        self._folder, self._places = folder, {}
        self._files: list[int] = []
        self._weight_map: dict[str, str] = {}
        count = len(shards)
        for i, shard in enumerate(shards):
            name = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._open(name, shard)

    def _open(self, file: str, shard: Mapping[str, tuple[np.dtype, tuple[int, ...], int]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape, offset) in shard.items():
            end = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {
                "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = os.open(self._folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.append(handle)
        os.truncate(handle, 8 + len(text) + end)
        _write_at(handle, struct.pack("<Q", len(text)) + text, 0)
        for name, (dtype, shape, offset) in shard.items():
            self._places[name] = (handle, dtype, shape, 8 + len(text) + offset)
            self._weight_map[name] = file

    def write(self, name: str, array: Shaped[np.ndarray, "..."]) -> None:
        """Writes one tensor, in the type that was announced for it."""
        handle, dtype, shape, offset = self._places.pop(name)
        assert array.shape == shape, (name, array.shape, shape)
        if array.dtype != dtype:
            array = array.astype(dtype)
        if not array.flags.c_contiguous:
            moved = np.empty(shape, dtype)
            copy(moved, array)
            array = moved
        _write_at(handle, memoryview(array.reshape(-1).view(np.uint8)), offset)

    def finish(self) -> None:
        """Puts everything on the disk and writes the index, where there are several shards."""
        assert not self._places, f"never written: {sorted(self._places)[:3]}"
        for handle in self._files:
            os.fsync(handle)
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        """Closes the files."""
        for handle in self._files:
            os.close(handle)
        self._files = []


def _write_at(handle: int, data: Any, offset: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(handle, left, offset)
        left, offset = left[count:], offset + count
