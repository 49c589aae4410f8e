"""Low-precision arithmetic: what the products of a model's linear maps are computed in."""

from typing import Literal

from moejax.numerics.fp8 import held_weights, quantize, quantized_matmul, straight_through

__all__ = ["Precision", "held_weights", "quantize", "quantized_matmul", "straight_through"]

Precision = Literal["native", "fp8"]
