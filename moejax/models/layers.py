"""Small layers that every block uses: RMSNorm, and a linear map over several axes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.numerics import Precision, quantized_matmul

DType = jnp.dtype


def compute_dtype(name: str) -> DType:
    """The type that ``model.dtype`` names; ``auto`` is float32 on a CPU, bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, in float32 (arXiv 1910.07467, eq. 4); the result has x's type."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


def kernel_init(init_std: float, num_inputs: int, ndim: int) -> nn.initializers.Initializer:
    """Normal of deviation ``init_std``, or scaled by fan-in where that is 0; inputs come first."""
    if init_std:
        return nn.initializers.normal(init_std)
    inputs, outputs = tuple(range(num_inputs)), tuple(range(num_inputs, ndim))
    return nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", inputs, outputs)


def linear(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_inputs: int, precision: Precision
) -> Float[Array, "..."]:
    """The last ``num_inputs`` axes of x, as one, times a kernel whose first axes they are.

    Args:
      x: inputs; in FP8 the axis before those is that of a sequence's tokens.
      kernel: the float32 master.
      num_inputs: how many axes are contracted.
      precision: of the product.

    Returns:
      The kernel's other axes in the place of those contracted, in x's type.
    """
    first = x.ndim - num_inputs
    if precision == "fp8":
        size = math.prod(x.shape[first:])
        y = quantized_matmul(x.reshape(*x.shape[:first], size), kernel.reshape(size, -1))
        return y.reshape(*x.shape[:first], *kernel.shape[num_inputs:])
    contracted = tuple(range(first, x.ndim)), tuple(range(num_inputs))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (contracted, ((), ())))


class Linear(nn.Module):
    """A linear map over the last ``num_inputs`` axes of x to new axes.

    Attributes:
      features: sizes of the new axes.
      axes: logical names of the kernel's axes, inputs first.
      num_inputs: how many of the last axes of x are contracted.
      init_std: deviation of the initial kernel; 0 scales by fan-in.
      bias: whether to add a bias, zeros at first.
      precision: of the product.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_inputs: int = 1
    init_std: float = 0.0
    bias: bool = False
    precision: Precision = "native"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        shape = x.shape[x.ndim - self.num_inputs :] + self.features
        init = kernel_init(self.init_std, self.num_inputs, len(shape))
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.axes), shape, jnp.float32
        )
        y = linear(x, kernel, self.num_inputs, self.precision)
        if not self.bias:
            return y
        init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.num_inputs :])
        bias = self.param("bias", init, self.features, jnp.float32).astype(x.dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
