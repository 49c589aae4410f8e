"""Random arrays: drawn in NumPy on a CPU, where compiling jax's generator takes seconds, and on the
device elsewhere, where billions of numbers from one host thread would take longer than the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Normals:
    """Normal numbers from a seed, one array after another.

    Constant operands would flatter a GPU, which draws less power on them and clocks higher.
    """

    def __init__(self, seed: int, dtype: str):
        """Arrays of this type; the same seed gives the same arrays in the same order."""
        self._rng, self._dtype = np.random.default_rng(seed), jnp.dtype(dtype)

    def __call__(self, *sizes: int, fan_in: int = 1) -> Array:
        """An array of these sizes, its deviation scaled by fan-in."""
        if jax.default_backend() != "cpu":
            return _draw(int(self._rng.integers(2**31)), sizes, fan_in**-0.5, self._dtype)
        values = self._rng.standard_normal(sizes, np.float32)
        values *= fan_in**-0.5
        return jnp.asarray(values).astype(self._dtype)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _draw(seed, sizes: tuple[int, ...], scale, dtype) -> Array:
    return (jax.random.normal(jax.random.key(seed), sizes) * scale).astype(dtype)
