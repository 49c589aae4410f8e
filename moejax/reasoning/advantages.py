"""From rewards to advantages, for groups of responses to one question.

Rows are P questions of G responses each, flattened to B = P * G with a question's responses side
by side.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# Rewards whose range is below this share of the largest are equal but for rounding.
EQUAL = 1e-6


def group_advantages(
    rewards: Float[Array, " B"], group_size: int, divide: bool = True
) -> Float[Array, " B"]:
    """Each reward less its group's mean, over the group's standard deviation where wanted.

    GRPO (arXiv 2402.03300, section 4.1.2) divides; Dr. GRPO (arXiv 2503.20783, section 3.2) does
    not. The deviation is the sample's (G - 1), as in the public implementations; the papers do not
    say. A group without spread has advantages of exactly 0, so nothing is added to the deviation,
    and advantages do not depend on the rewards' scale.

    Args:
      rewards: of each response.
      group_size: responses to a question, at least 2.
      divide: by the deviation.

    Raises:
      ValueError: the rewards are not whole groups of at least 2.
    """
    grouped = _grouped(rewards, group_size)
    centred = grouped - jnp.mean(grouped, axis=1, keepdims=True)
    spread = _spread(grouped)[:, None]
    if divide:
        centred /= jnp.where(spread, jnp.std(grouped, axis=1, keepdims=True, ddof=1), 1.0)
    return jnp.where(spread, centred, 0.0).reshape(-1)


@struct.dataclass
class KeptGroups:
    """Which responses dynamic sampling keeps.

    Attributes:
      rows: True for the responses of a group with spread.
      dropped: groups without spread.
    """

    rows: Bool[Array, " B"]
    dropped: Int[Array, ""]


def keep_groups_with_spread(rewards: Float[Array, " B"], group_size: int) -> KeptGroups:
    """DAPO's dynamic sampling (arXiv 2503.14476, eq. 11): groups that are all right or all wrong
    have no gradient, and are left out.

    Args:
      rewards: of accuracy, before any shaping by length.
      group_size: responses to a question, at least 2.

    Raises:
      ValueError: the rewards are not whole groups of at least 2.
    """
    spread = _spread(_grouped(rewards, group_size))
    return KeptGroups(jnp.repeat(spread, group_size), jnp.sum(~spread))


def overlong_rewards(
    lengths: Int[Array, " B"], max_length: int, buffer: float, penalty: float = 1.0
) -> Float[Array, " B"]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to the rewards.

    It is 0 up to ``max_length * (1 - buffer)`` tokens, then falls linearly to ``-penalty`` at
    ``max_length``, and stays there.

    Args:
      lengths: tokens of each response.
      max_length: longest length allowed.
      buffer: the last share of it, over which the penalty grows; 0 punishes nothing.
      penalty: largest penalty.
    """
    if not buffer:
        return jnp.zeros(lengths.shape, jnp.float32)
    beyond = lengths.astype(jnp.float32) - max_length * (1 - buffer)
    return -penalty * jnp.clip(beyond / (max_length * buffer), 0.0, 1.0)


def _grouped(rewards, group_size: int) -> Float[Array, "P G"]:
    if group_size < 2 or rewards.shape[0] % group_size:
        raise ValueError(f"{rewards.shape[0]} rewards are not whole groups of {group_size} (>= 2)")
    return rewards.astype(jnp.float32).reshape(-1, group_size)


def _spread(grouped: Float[Array, "P G"]) -> Bool[Array, " P"]:
    largest = jnp.max(jnp.abs(grouped), axis=1)
    return jnp.ptp(grouped, axis=1) > EQUAL * largest
