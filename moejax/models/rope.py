"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.models.attention_config import RopeConfig


def frequencies(theta: float, width: int, rope: RopeConfig) -> Float[np.ndarray, " half"]:
    """Radians that each pair of channels turns by from one position to the next.

    They are computed in float64 and rounded once, so that they are constants of the program.

    Args:
      theta: base; pair i turns by theta^(-2i/width) before any scaling.
      width: channels that turn, an even number.
      rope: how frequencies are scaled; ``yarn`` after arXiv 2309.00071, section 3.2, with the
        ramp's ends as in DeepSeek's code, ``llama3`` after Llama 3.1's.

    Returns:
      width / 2 frequencies, in float32.
    """
    plain = theta ** (-np.arange(0, width, 2) / width)
    if rope.scaling == "linear":
        kept = np.zeros_like(plain)
    elif rope.scaling == "llama3":
        # Turns of a pair within pre-training's context.
        turns = plain * rope.original_length / (2 * math.pi)
        span = rope.high_frequency_factor - rope.low_frequency_factor
        kept = np.clip((turns - rope.low_frequency_factor) / span, 0, 1)
    elif rope.scaling == "yarn":
        low, high = yarn_range(theta, width, rope)
        kept = 1 - np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0, 1)
    else:
        kept = np.ones_like(plain)
    return (plain * (kept + (1 - kept) / rope.factor)).astype(np.float32)


def yarn_range(theta: float, width: int, rope: RopeConfig) -> tuple[float, float]:
    """Pairs between which YaRN goes over from keeping a frequency to dividing it.

    They are those that make ``beta_fast`` and ``beta_slow`` turns in pre-training's context.
    """

    def pair(turns: float) -> float:
        wavelength = rope.original_length / turns
        return width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound is the last channel, not the last pair: so in the code that models came from.
    return max(low, 0), min(high, width - 1)


def rotate(
    x: Float[Array, "B S H d"],
    positions: Int[Array, "B S"],
    frequency: Float[np.ndarray, " half"] | Float[Array, " half"],
    factor: float = 1.0,
) -> Float[Array, "B S H d"]:
    """Turns channel pairs (i, i + half) by the angle position · frequency_i.

    Angles are computed in float32; the result has the type of ``x``.

    Args:
      x: queries or keys.
      positions: position of each token in its document.
      frequency: radians a position, one for each pair; channels from 2 · half on stay as they are.
      factor: on cosine and sine, ``RopeConfig.cos_sin_factor``.
    """
    half = len(frequency)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
    wide = x[..., : 2 * half].astype(jnp.float32)
    first, second = wide[..., :half], wide[..., half:]
    parts = [first * cos - second * sin, second * cos + first * sin]
    parts = [part.astype(x.dtype) for part in parts]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1)
