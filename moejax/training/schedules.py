"""Schedules as numbers, so that a compiled training step can take them as arguments.

A schedule written as a Python function ends up in the program as constants: every seed, learning
rate and length of a run would be another program to compile. Here schedules are trees of scalars
that are called with a step. Called with arguments of a program they compute in it; called with
their own NumPy scalars they are ordinary schedules, as optax has them.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32


@struct.dataclass
class LearningRate:
    """A linear warm-up from 0, a plateau, and a decay; called with a step, counted from 0.

    The decay is ``unit · (fall · share + last)``, where the share goes from 1 to 0: a sum that is
    rounded as optax rounds its own schedules.

    Attributes:
      peak: highest learning rate.
      warmup: steps of warm-up.
      start: step that the decay begins at; at ``warmup`` there is no plateau.
      length: steps that the decay takes, at least 1; the last rate stays.
      unit: what ``fall`` and ``last`` are shares of.
      fall: what the decay takes off.
      last: what it leaves.
      shape: of the decay.
    """

    peak: Float[Array, ""]
    warmup: Int[Array, ""]
    start: Int[Array, ""]
    length: Int[Array, ""]
    unit: Float[Array, ""]
    fall: Float[Array, ""]
    last: Float[Array, ""]
    shape: Literal["cosine", "linear"] = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, shape: Literal["cosine", "linear"], *, peak: float, final_fraction: float,
        warmup: int, start: int, length: int,
    ) -> "LearningRate":  # fmt: skip
        """A schedule from Python numbers; ``final_fraction`` is the last rate over the peak."""
        if shape == "cosine":
            unit, fall, last = peak, 1 - final_fraction, final_fraction
        else:
            unit, fall, last = 1.0, peak - peak * final_fraction, peak * final_fraction
        steps, rates = (warmup, start, length), (unit, fall, last)
        return cls(np.float32(peak), *map(np.int32, steps), *map(np.float32, rates), shape)

    def __call__(self, step: Int[Array, "*shape"] | int) -> Float[Array, "*shape"]:
        """The learning rate of a step."""
        done = jnp.clip(step, 0, self.warmup)
        rising = self.peak - self.peak * (1 - done / jnp.maximum(self.warmup, 1))
        done = jnp.clip(step - self.start, 0, self.length)
        if self.shape == "cosine":
            share = 0.5 * (1 + jnp.cos(jnp.pi * done / self.length))
        else:
            share = 1 - done / self.length
        falling = self.unit * (self.fall * share + self.last)
        rate = jnp.where(step < self.start, self.peak, falling)
        return jnp.where(step < self.warmup, rising, rate)


@struct.dataclass
class MTPWeight:
    """Weight of the MTP modules' loss; called with a step, counted from 0.

    Attributes:
      before: weight of the first steps.
      after: weight from the switch on.
      switch: first step of the second weight.
    """

    before: Float[Array, ""]
    after: Float[Array, ""]
    switch: Int[Array, ""]

    @classmethod
    def of(cls, before: float, after: float, switch: int) -> "MTPWeight":
        """A schedule from Python numbers."""
        return cls(np.float32(before), np.float32(after), np.int32(switch))

    def __call__(self, step: Int[Array, "*shape"] | int) -> Float[Array, "*shape"]:
        """The weight of a step."""
        return jnp.where(step < self.switch, self.before, self.after)


@struct.dataclass
class Hyper:
    """What a training step is told beside its state and its batch.

    Attributes:
      seed: of the routers' noise.
      learning_rate: the learning rate by step.
      mtp_weight: weight of the MTP modules' loss by step.
    """

    seed: UInt32[Array, ""]
    learning_rate: LearningRate
    mtp_weight: MTPWeight
