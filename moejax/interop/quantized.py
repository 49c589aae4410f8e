"""Checkpoints as their numbers: quantised tensors come out in BF16, all others as they are.

FP8 in blocks (DeepSeek-V3, Kimi-K2): beside ``X.weight`` in E4M3 stands ``X.weight_scale_inv`` in
FP32, one factor a block of 128 x 128; blocks at the lower and right edge may be smaller.
MXFP4 (gpt-oss): ``X_blocks`` holds two E2M1 numbers a byte, the first in the low half, sixteen
bytes a group of 32; ``X_scales`` a power of two a group, as an exponent above -127 (OCP
Microscaling Formats 1.0). Rows of the blocks are outputs; ``X`` itself has inputs first.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from moejax.config import UserError
from moejax.interop.safetensors_io import Stored

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
CHUNK = 1 << 22

# The sixteen values of E2M1: sign, two bits of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, quantisation resolved.

    Attributes:
      dtype: type of its numbers; BF16 where it was quantised.
      shape: its shape.
      file: where it stands, for messages.
      read: reads it.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    file: str
    read: Callable[[], Shaped[np.ndarray, "..."]]


def numbers(
    stored: Mapping[str, Stored], quantization: Mapping[str, Any] | None, where: str
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, their scales taken in.

    Args:
      stored: what the files hold.
      quantization: the config's ``quantization_config``.
      where: the config's file, for messages.

    Raises:
      UserError: a quantisation that is not read here, or a quantised tensor without its scales.
    """
    method, block = _method(quantization, where)
    found = {}
    for name, tensor in stored.items():
        if method == "mxfp4" and name.endswith(BLOCKS):
            scales = _beside(stored, name, name.removesuffix(BLOCKS) + SCALES)
            found[name.removesuffix(BLOCKS)] = _mxfp4(name, tensor, scales)
        elif tensor.dtype in FP8:
            if method != "fp8":
                raise UserError(
                    f"{str(tensor.file)!r}: tensor {name} is FP8, but the config has no "
                    "quantization_config of quant_method 'fp8'; restore config.json"
                )
            found[name] = _fp8(name, tensor, _beside(stored, name, name + SCALE), block)
        elif not _is_scale(name, stored, method):
            found[name] = Tensor(tensor.dtype, tensor.shape, str(tensor.file), tensor.read)
    return found


def _method(quantization: Mapping[str, Any] | None, where: str) -> tuple[str, tuple[int, int]]:
    if not quantization:
        return "none", (1, 1)
    if not isinstance(quantization, Mapping):
        raise UserError(
            f"{where}: quantization_config = {quantization!r}: must be a block of fields; restore "
            "the file"
        )
    method = quantization.get("quant_method")
    if method not in ("fp8", "mxfp4"):
        raise UserError(
            f"{where}: quantization_config.quant_method = {method!r}: moejax reads 'fp8' in blocks "
            "and 'mxfp4'; get the model's BF16 weights"
        )
    block = quantization.get("weight_block_size")
    if method == "mxfp4":
        return method, (1, 1)
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0
                                                                 for b in block)):  # fmt: skip
        raise UserError(
            f"{where}: quantization_config.weight_block_size = {block!r}: must be two sizes above "
            "zero; FP8 with one scale a tensor is not read, get the model's BF16 weights"
        )
    return method, (block[0], block[1])


def _is_scale(name: str, stored: Mapping[str, Stored], method: str) -> bool:
    if method == "fp8":
        return name.endswith(SCALE) and name.removesuffix(SCALE) in stored
    return method == "mxfp4" and name.endswith(SCALES)


def _beside(stored: Mapping[str, Stored], name: str, scale: str) -> Stored:
    if scale not in stored:
        raise UserError(
            f"{str(stored[name].file)!r}: tensor {name} is quantised, but its {scale} is missing; "
            "download the checkpoint again"
        )
    return stored[scale]


def _refuse(name: str, scale: Stored, wanted: tuple[int, ...]) -> None:
    if scale.shape != wanted:
        raise UserError(
            f"{str(scale.file)!r}: the scales of {name} have shape {list(scale.shape)} instead of "
            f"{list(wanted)}; download the checkpoint again"
        )


def _fp8(name: str, weight: Stored, scale: Stored, block: tuple[int, int]) -> Tensor:
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    _refuse(name, scale, (-(-rows // block[0]), -(-columns // block[1])))
    read = lambda: dequantize_fp8(weight.read(), scale.read(), block)
    return Tensor(BF16, weight.shape, str(weight.file), read)


def _mxfp4(name: str, blocks: Stored, scales: Stored) -> Tensor:
    *lead, rows, groups, half = blocks.shape
    _refuse(name, scales, (*lead, rows, groups))
    read = lambda: np.swapaxes(dequantize_mxfp4(blocks.read(), scales.read()), -1, -2)
    return Tensor(BF16, (*lead, groups * half * 2, rows), str(blocks.file), read)


def dequantize_fp8(
    weight: Shaped[np.ndarray, "m n"], scale: Float[np.ndarray, "bm bn"], block: tuple[int, int]
) -> Shaped[np.ndarray, "m n"]:
    """weight · scale of its block, multiplied in float32 and rounded to BF16."""
    rows, columns = weight.shape
    wide = np.repeat(scale.astype(np.float32), block[1], axis=1)[:, :columns]
    result = np.empty(weight.shape, BF16)
    for i in range(len(scale)):  # a row of blocks at a time, so that little is in float32 at once
        part = slice(i * block[0], min((i + 1) * block[0], rows))
        result[part] = (weight[part].astype(np.float32) * wide[i][None]).astype(BF16)
    return result


def dequantize_mxfp4(
    blocks: UInt8[np.ndarray, "*rows g 16"], scales: UInt8[np.ndarray, "*rows g"]
) -> Shaped[np.ndarray, "*rows n"]:
    """E2M1 numbers times their group's power of two, exact in BF16; n = 32 · g."""
    result = np.empty((*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1] * 2), BF16)
    flat, block = result.reshape(-1, result.shape[-1]), blocks.reshape(-1, *blocks.shape[-2:])
    power = np.ldexp(np.float32(1), scales.reshape(-1, scales.shape[-1]).astype(np.int32) - 127)
    step = max(1, CHUNK // result.shape[-1])  # so that little is in float32 at once
    for i in range(0, len(flat), step):
        part = block[i : i + step]
        values = np.stack([E2M1[part & 15], E2M1[part >> 4]], axis=-1)
        values *= power[i : i + step, :, None, None]
        flat[i : i + step] = values.reshape(len(part), -1).astype(BF16)
    return result
