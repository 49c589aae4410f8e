"""Quantiles from histograms, which are sums: micro-batches and devices can be added up.

Bins are narrow around 0 and wider further out (an inverse hyperbolic sine), since thresholds of
scores that sum to one over many experts are small: relative width 0.7 % down to 0.001, and up to
2 either way, beyond which values count as the outermost bin's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

BINS = 2048
SMALLEST, LARGEST = 1e-3, 2.0


def histogram(values: Float[Array, "T E"], valid: Bool[Array, " T"]) -> Float[Array, "E bins"]:
    """How many of each expert's values fall into each bin; not differentiable."""
    values = jax.lax.stop_gradient(values)
    limit = jnp.arcsinh(LARGEST / SMALLEST)
    place = (jnp.arcsinh(values / SMALLEST) / limit + 1) * (BINS / 2)
    index = jnp.clip(place.astype(jnp.int32), 0, BINS - 1)
    flat = jnp.arange(values.shape[1], dtype=jnp.int32)[None, :] * BINS + index
    flat = jnp.where(valid[:, None], flat, values.shape[1] * BINS)
    counts = jnp.bincount(flat.reshape(-1), length=values.shape[1] * BINS + 1)[:-1]
    return counts.reshape(-1, BINS).astype(jnp.float32)


def quantile_of_histogram(
    counts: Float[Array, "*layers E bins"], share: float
) -> Float[Array, "*layers E"]:
    """The value that this share of an expert's values lies above, linear within a bin.

    Args:
      counts: from ``histogram``, summed over a batch.
      share: between 0 and 1.
    """
    total = jnp.sum(counts, axis=-1, keepdims=True)
    above = jnp.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]  # values in this bin or higher
    wanted = share * total
    # The highest bin at whose lower edge at least the wanted number lies above.
    bin_ = jnp.maximum(jnp.sum(above >= wanted, axis=-1, keepdims=True) - 1, 0)
    inside = jnp.take_along_axis(counts, bin_, axis=-1)
    beyond = jnp.take_along_axis(above, bin_, axis=-1) - inside
    part = jnp.clip((wanted - beyond) / jnp.maximum(inside, 1e-9), 0, 1)  # from the upper edge
    place = bin_ + 1 - part
    limit = jnp.arcsinh(LARGEST / SMALLEST)
    return (SMALLEST * jnp.sinh((place / (BINS / 2) - 1) * limit))[..., 0]
