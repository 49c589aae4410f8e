"""Random arrays, drawn in NumPy: compiling the generator of jax takes seconds on a CPU."""

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
        values = self._rng.standard_normal(sizes, np.float32)
        values *= fan_in**-0.5
        return jnp.asarray(values).astype(self._dtype)
