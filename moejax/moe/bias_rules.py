"""Rules that move a selection bias against the load, once an optimizer step. All in float32.

The bias is added to the scores that choose experts and to nothing else. A rule sees the load of the
whole batch, summed over devices and micro-batches, so that it is the same on any mesh.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import check
from moejax.moe.quantiles import quantile_of_histogram

BiasRuleName = Literal["none", "sign", "centred", "smebu", "quantile", "longcat"]
State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class BiasRule:
    """A rule and its constants; ``moejax.moe.routers.top_k`` takes them from the router's options.

    Attributes:
      name: ``none`` keeps no bias. ``sign``: b += step · sign(mean load - load) (loss-free
        balancing, arXiv 2408.15664, algorithm 1; DeepSeek-V3). ``centred``: the same with the
        update's mean taken off, so that the sum of b never changes (torchtitan, Moonlight, Ling).
        ``smebu``: v = (mean - load) / mean, d = step · tanh(2 v) centred, m = momentum · m +
        (1 - momentum) · d, b += m (Trinity, arXiv 2602.17004). ``quantile``: b_j becomes minus the
        (TK/E + 1)-th largest, over the batch's tokens, of a score less the token's (K+1)-th
        largest biased score; an average with the earlier b by ``momentum``, its mean taken off.
        ``longcat``: b += step · (target share - share), the shares of all assignments
        (LongCat-Flash, arXiv 2509.01322, eq. 3).
      step: size of a step; not used by ``quantile``.
      momentum: share of the past that ``smebu`` and ``quantile`` keep.
      stop_step: optimizer steps after which b stays as it is; 0 means never. DeepSeek-V3 stops for
        the last 0.5T of 14.8T tokens.
    """

    name: BiasRuleName
    step: float
    momentum: float
    stop_step: int

    def check(self, prefix: str = "router") -> None:
        """Raises ConfigError for constants out of range."""
        for field, value in (("bias_step", self.step), ("bias_stop_step", self.stop_step)):
            check(value >= 0, f"{prefix}.{field}", value, "must not be below zero")
        check(
            0 <= self.momentum < 1, f"{prefix}.bias_momentum", self.momentum,
            "is no share of the past; choose one from 0 to below 1",
        )  # fmt: skip

    def initial(self, num_choices: int) -> State:
        """The state before the first step: ``bias``, and what else the rule keeps."""
        if self.name == "none":
            return {}
        state = {"bias": jnp.zeros(num_choices, jnp.float32)}
        if self.name == "smebu":
            state["momentum"] = jnp.zeros(num_choices, jnp.float32)
        if self.stop_step:
            state["updates"] = jnp.zeros((), jnp.int32)
        return state

    def update(
        self, state: State, load: Float[Array, "*layers N"], histogram: Array | None = None,
        share: float | None = None, target: Float[Array, " N"] | None = None,
    ) -> State:  # fmt: skip
        """The state after an optimizer step.

        Args:
          state: as ``initial`` made it; leading axes (stacked layers) are allowed.
          load: assignments of each choice in the whole batch.
          histogram: for ``quantile``: see ``moejax.moe.quantiles``.
          share: for ``quantile``: the share K / E of the tokens that an expert shall get.
          target: for ``longcat``: wanted share of all assignments of each choice; a negative one
            marks a choice whose bias stays 0.
        """
        if self.name == "none":
            return state
        new = dict(state)
        if self.name == "smebu":
            new["momentum"] = smebu_momentum(state["momentum"], load, self.step, self.momentum)
            new["bias"] = state["bias"] + new["momentum"]
        elif self.name == "quantile":
            wanted = -quantile_of_histogram(histogram, share)
            seen = jnp.sum(load, axis=-1, keepdims=True) > 0
            mixed = self.momentum * state["bias"] + (1 - self.momentum) * wanted
            # The same added to all changes no choice, but would drift out of the histogram.
            mixed = mixed - jnp.mean(mixed, axis=-1, keepdims=True)
            new["bias"] = jnp.where(seen, mixed, state["bias"])
        elif self.name == "longcat":
            new["bias"] = longcat_bias_update(state["bias"], load, target, self.step)
        else:
            rule = {"sign": sign_bias_update, "centred": centred_bias_update}[self.name]
            new["bias"] = rule(state["bias"], load, self.step)
        if self.stop_step:
            moving = state["updates"] < self.stop_step
            new = {
                name: jnp.where(_over_last(moving, value), value, state[name])
                for name, value in new.items()
            }
            new["updates"] = state["updates"] + 1
        return new


def _over_last(flag: Array, value: Array) -> Array:
    """A flag of each layer against values that may have an axis of experts."""
    return flag.reshape(flag.shape + (1,) * (value.ndim - flag.ndim))


def sign_bias_update(
    bias: Float[Array, "*layers E"], load: Float[Array, "*layers E"], step: float
) -> Float[Array, "*layers E"]:
    """b_i + step · sign(mean load - load_i): an overloaded expert becomes less attractive.

    Source: loss-free balancing (arXiv 2408.15664, algorithm 1), used by DeepSeek-V3.
    """
    return bias + step * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def centred_bias_update(
    bias: Float[Array, "*layers E"], load: Float[Array, "*layers E"], step: float
) -> Float[Array, "*layers E"]:
    """The sign rule with its update's mean taken off: the sum of b does not change."""
    move = step * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    return bias + move - jnp.mean(move, axis=-1, keepdims=True)


def smebu_momentum(
    momentum: Float[Array, "*layers E"], load: Float[Array, "*layers E"], step: float, keep: float
) -> Float[Array, "*layers E"]:
    """keep · m + (1 - keep) · d, with d = step · tanh(2 (mean - load) / mean), centred.

    Source: soft-clamped momentum expert bias updates, Trinity (arXiv 2602.17004).
    """
    mean = jnp.mean(load, axis=-1, keepdims=True)
    move = step * jnp.tanh(2 * (mean - load) / jnp.maximum(mean, 1))
    move = move - jnp.mean(move, axis=-1, keepdims=True)
    return keep * momentum + (1 - keep) * move


def longcat_bias_update(
    bias: Float[Array, "*layers N"],
    load: Float[Array, "*layers N"],
    target: Float[Array, " N"],
    step: float,
) -> Float[Array, "*layers N"]:
    """b_i + step · (target_i - share_i) where target_i is not negative; others stay.

    Source: LongCat-Flash (arXiv 2509.01322, eq. 3): an FFN expert's target is K_e / (K N).
    """
    total = jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)
    goal = target.reshape((1,) * (load.ndim - 1) + target.shape)
    return bias + jnp.where(goal >= 0, step * (goal - load / total), 0.0)
