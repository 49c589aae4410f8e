"""Group-relative policy optimization and its variants, as config values (block ``rl``).

A preset names one published recipe; every field of it can be set by itself. A field that is None
has the preset's value; ``RLConfig.resolved`` fills them in. No code asks for a preset's name.
"""

import dataclasses
import types
from typing import Any, Literal

from moejax.config import check, check_not_negative, check_positive

# What the recipes have in common: one pass over a rollout in one step, nothing extra.
_COMMON = dict(
    advantage_std=True, aggregate="sequence_mean", ratio="token", clip_low=0.2, clip_high=0.2,
    kl_weight=0.0, kl_estimate="k3", reference_every=0, entropy_weight=0.0, dynamic_sampling=False,
    overlong_buffer=0.0, overlong_penalty=0.0, truncated_is=0.0, routing_replay="none",
    temperature=1.0, epochs=1, minibatches=1,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath (arXiv 2402.03300, section 4.2). It does not say its clip range; 0.2 is PPO's.
    "grpo": _COMMON | dict(group_size=64, kl_weight=0.04),
    # DeepSeek-R1-Zero (arXiv 2501.12948; Nature 2025). Its clip range of 10 has no lower bound,
    # since ratios are positive: that is clip_low = 1.
    "r1": _COMMON | dict(
        group_size=16, clip_low=1.0, clip_high=10.0, kl_weight=1e-3, reference_every=400,
        minibatches=16,
    ),
    # Dr. GRPO (arXiv 2503.20783, section 3.2); sizes from the authors' published scripts.
    "dr_grpo": _COMMON | dict(
        group_size=8, advantage_std=False, aggregate="constant", minibatches=8
    ),
    # DAPO (arXiv 2503.14476, section 4.1): 4,096 of 20,480 tokens are the overlong buffer.
    "dapo": _COMMON | dict(
        group_size=16, aggregate="token_mean", clip_high=0.28, dynamic_sampling=True,
        overlong_buffer=0.2, overlong_penalty=1.0, minibatches=16,
    ),
    # GSPO (arXiv 2507.18071, section 5.1). It does not say its group size; 16 is DAPO's and R1's.
    "gspo": _COMMON | dict(
        group_size=16, ratio="sequence", clip_low=3e-4, clip_high=4e-4, minibatches=4
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Options of the policy's update. None means the value of the preset ``algorithm``.

    Some fields follow another one, where they are not set themselves: without a KL term the
    reference is not refreshed; without an overlong buffer there is no penalty, and the reverse.

    Attributes:
      algorithm: the preset: ``grpo`` (DeepSeekMath's values), ``r1`` (GRPO with R1-Zero's),
        ``dr_grpo``, ``dapo`` or ``gspo``.
      group_size: responses sampled to each question, at least 2.
      advantage_std: divide advantages by the deviation of the group's rewards.
      aggregate: how tokens' losses become one: ``sequence_mean`` (the mean of each response, then
        over responses), ``token_mean`` (over all tokens) or ``constant`` (each response's sum over
        the longest length allowed, then the mean over responses).
      ratio: probability ratio of each ``token``, or of the ``sequence`` (its geometric mean).
      clip_low: the ratio is clipped below 1 - clip_low; 1 never clips, ratios being positive.
      clip_high: the ratio is clipped above 1 + clip_high.
      kl_weight: of the divergence from the reference; 0 needs no reference.
      kl_estimate: ``k3``, as GRPO has it, whose gradient is that of KL(reference || policy), or
        ``k3_weighted``, times the probability ratio, whose gradient is that of
        KL(policy || reference); see ``moejax.reasoning.losses.k3``.
      reference_every: optimizer steps between refreshes of the reference by the policy; 0: never.
      entropy_weight: of the entropy bonus.
      dynamic_sampling: leave out groups whose rewards are all equal, and sample others.
      overlong_buffer: last share of the longest length allowed, over which a penalty grows; 0 has
        none.
      overlong_penalty: what is taken off the reward at the full length.
      truncated_is: largest weight of a token by the ratio of the trainer's old policy to the
        sampler; 0 applies none.
      routing_replay: experts in the update: ``none`` (the live router's), ``rollout`` (those that
        the sampler chose, R3) or ``old_policy`` (those that the old policy chose when the trainer
        ran it, R2). Gate values are the live router's in all cases.
      temperature: of sampling; the policy's log-probabilities are taken at the same.
      epochs: passes over a rollout.
      minibatches: optimizer steps in a pass.
    """

    algorithm: Literal["grpo", "r1", "dr_grpo", "dapo", "gspo"] = "grpo"
    group_size: int | None = None
    advantage_std: bool | None = None
    aggregate: Literal["sequence_mean", "token_mean", "constant"] | None = None
    ratio: Literal["token", "sequence"] | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    kl_weight: float | None = None
    kl_estimate: Literal["k3", "k3_weighted"] | None = None
    reference_every: int | None = None
    entropy_weight: float | None = None
    dynamic_sampling: bool | None = None
    overlong_buffer: float | None = None
    overlong_penalty: float | None = None
    truncated_is: float | None = None
    routing_replay: Literal["none", "rollout", "old_policy"] | None = None
    temperature: float | None = None
    epochs: int | None = None
    minibatches: int | None = None

    def __post_init__(self) -> None:
        check(self.algorithm in PRESETS, "rl.algorithm", self.algorithm, f"known: {[*PRESETS]}")
        full = self._values()
        _check_ranges(full)
        self._check_choices_fit(full)

    def _values(self) -> types.SimpleNamespace:
        """Every field's value, none of which is None."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {k: v for k, v in given.items() if v is not None}
        full = PRESETS[self.algorithm] | values
        if not full["kl_weight"] and self.reference_every is None:
            full["reference_every"] = 0
        if not full["overlong_buffer"] and self.overlong_penalty is None:
            full["overlong_penalty"] = 0.0
        if not full["overlong_penalty"] and self.overlong_buffer is None:
            full["overlong_buffer"] = 0.0
        return types.SimpleNamespace(**full)

    def _check_choices_fit(self, full: types.SimpleNamespace) -> None:
        """Refuses a field whose value does nothing, or that a preset's other value contradicts."""
        if full.reference_every:
            check(
                full.kl_weight > 0, "rl.reference_every", full.reference_every,
                "refreshes a reference that nothing uses with kl_weight = 0; set kl_weight",
            )  # fmt: skip
        check(
            full.overlong_buffer > 0 or not full.overlong_penalty,
            "rl.overlong_penalty", full.overlong_penalty,
            "is never taken off with overlong_buffer = 0; set overlong_buffer",
        )  # fmt: skip
        check(
            full.overlong_penalty > 0 or not full.overlong_buffer,
            "rl.overlong_buffer", full.overlong_buffer,
            "does nothing with overlong_penalty = 0; set overlong_penalty",
        )  # fmt: skip
        own = PRESETS[self.algorithm]["ratio"]
        check(
            full.ratio == own or None not in (self.clip_low, self.clip_high),
            "rl.ratio", full.ratio,
            f"the clip range of {self.algorithm!r} is for ratio = {own!r}; set clip_low and "
            "clip_high as well (a token's ratio: about 0.2, a sequence's: about 3e-4)",
        )  # fmt: skip

    def resolved(self) -> "RLConfig":
        """The same options with every field set."""
        return dataclasses.replace(self, **vars(self._values()))


def _check_ranges(full: types.SimpleNamespace) -> None:
    """Raises ConfigError for the first value that is out of its range by itself."""
    check(
        full.group_size >= 2, "rl.group_size", full.group_size,
        "a response is judged by its group's others; sample at least 2",
    )  # fmt: skip
    check_positive("rl", full, "clip_low", "clip_high", "temperature", "epochs", "minibatches")
    check(
        full.clip_low <= 1, "rl.clip_low", full.clip_low,
        "a ratio is never below 0; 1 clips nothing, and is the most",
    )  # fmt: skip
    names = ["kl_weight", "reference_every", "entropy_weight", "overlong_buffer"]
    check_not_negative("rl", full, *names, "overlong_penalty", "truncated_is")
    check(
        full.overlong_buffer <= 1, "rl.overlong_buffer", full.overlong_buffer,
        "is a share of the longest length allowed, from 0 to 1",
    )  # fmt: skip
    check(
        full.truncated_is == 0 or full.truncated_is >= 1, "rl.truncated_is", full.truncated_is,
        "a cap below 1 scales tokens down that need no correction; give 0 (none) or 1 and more",
    )  # fmt: skip
