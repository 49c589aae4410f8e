"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B S H d"], positions: Int[Array, "B S"], theta: float
) -> Float[Array, "B S H d"]:
    """Turns channel pairs (i, i + d/2) by the angle position · theta^(-2i/d).

    Angles are computed in float32; the result has the type of ``x``.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
