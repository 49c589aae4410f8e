"""Small layers that every block uses: RMSNorm, and a linear map over several axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


class Linear(nn.Module):
    """A linear map without bias, over the last ``num_inputs`` axes of x to new axes.

    Attributes:
      features: sizes of the new axes.
      axes: logical names of the kernel's axes, inputs first.
      num_inputs: how many of the last axes of x are contracted.
      init_std: deviation of the initial kernel; 0 scales by fan-in.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_inputs: int = 1
    init_std: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        shape = x.shape[x.ndim - self.num_inputs :] + self.features
        inputs = tuple(range(self.num_inputs))
        outputs = tuple(range(self.num_inputs, len(shape)))
        if self.init_std:
            init = nn.initializers.normal(self.init_std)
        else:
            init = nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", inputs, outputs
            )
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.axes), shape, jnp.float32
        )
        contracted = tuple(range(x.ndim - self.num_inputs, x.ndim))
        return jax.lax.dot_general(x, kernel.astype(x.dtype), ((contracted, inputs), ((), ())))
