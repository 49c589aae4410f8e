"""The policy's loss: GRPO and its variants, as pure functions of log-probabilities.

Arrays are (B, S): B responses, S positions whose *targets* are the tokens; log-probabilities are
float32 and of those targets; the mask is 1 where the target is a token of the response. What stands
where the mask is 0, NaN included, changes nothing and has a gradient of exactly 0.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.reasoning.rl_config import RLConfig

# Log-ratios are kept within this, so that no ratio overflows; a policy that gives a token e^20
# times its old probability has left the region where the loss means anything.
LOG_RATIO_LIMIT = 20.0
# A token's log-probabilities in sampler and trainer that differ by more are counted.
GAP_BOUND = 0.1

Metrics = dict[str, Float[Array, ""]]
PerToken = Float[Array, "B S"]


def response_mask(
    prompt_lengths: Int[Array, " B"], lengths: Int[Array, " B"], width: int
) -> Float[Array, "B width"]:
    """1 where the next token (target) is one of the response, in rows of one response each.

    Args:
      prompt_lengths: tokens of each prompt, at least 1.
      lengths: tokens of each row, prompt and response together.
      width: positions of a row of inputs; target t is token t + 1.
    """
    token = jnp.arange(1, width + 1)[None]
    inside = (token >= prompt_lengths[:, None]) & (token < lengths[:, None])
    return inside.astype(jnp.float32)


@struct.dataclass
class Totals:
    """What losses are divided by, where a batch comes in parts: sums over all of them.

    Attributes:
      responses: rows with at least one token.
      tokens: tokens of all responses.
    """

    responses: Float[Array, ""]
    tokens: Float[Array, ""]

    @classmethod
    def of(cls, mask: PerToken) -> "Totals":
        """The totals of a mask; those of parts may be added."""
        return cls(jnp.sum(jnp.any(mask > 0, axis=1)).astype(jnp.float32), jnp.sum(mask))


def aggregate(
    values: PerToken, mask: PerToken, form: str, max_length: int = 0, totals: Totals | None = None
) -> Float[Array, ""]:
    """Tokens' values as one number.

    Args:
      values: of each token; finite where the mask is 0 too.
      mask: 1 for the tokens that count.
      form: ``sequence_mean``: GRPO (arXiv 2402.03300, eq. 3), the mean of each response, then over
        responses. ``token_mean``: DAPO (arXiv 2503.14476, eq. 8). ``constant``: Dr. GRPO (arXiv
        2503.20783, section 3.2 and listing 1), each response's sum over ``max_length``, then the
        mean over responses.
      max_length: longest length allowed, for ``constant``.
      totals: of the whole batch, where this is a part of one: parts then add up to the whole.

    Raises:
      ValueError: ``constant`` without a ``max_length``, or no such form.
    """
    totals = Totals.of(mask) if totals is None else totals
    responses, tokens = jnp.maximum(totals.responses, 1), jnp.maximum(totals.tokens, 1)
    sums = jnp.sum(values * mask, axis=1)
    if form == "sequence_mean":
        return jnp.sum(sums / jnp.maximum(jnp.sum(mask, axis=1), 1)) / responses
    if form == "token_mean":
        return jnp.sum(sums) / tokens
    if form == "constant" and max_length > 0:
        return jnp.sum(sums) / (responses * max_length)
    raise ValueError(f"aggregate {form!r} with max_length {max_length} is none of the three forms")


def log_ratio(logp: PerToken, old_logp: PerToken, mask: PerToken, kind: str) -> PerToken:
    """Log of the ratio of new to old probabilities, 0 where the mask is.

    ``token`` is GRPO's. ``sequence`` is GSPO's (arXiv 2507.18071, eq. 7), the mean over the
    response's tokens, and stands at each of them.
    """
    difference = _where(mask, logp - old_logp)
    if kind == "sequence":
        mean = jnp.sum(difference, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
        difference = _where(mask, jnp.broadcast_to(mean[:, None], mask.shape))
    return jnp.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_surrogate(
    ratio: PerToken, advantages: Float[Array, " B"], clip_low: float, clip_high: float
) -> PerToken:
    """PPO's pessimistic objective with two bounds, to be maximized (arXiv 1707.06347, eq. 7).

    It is min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): the gradient is 0 where r is above
    the range and A positive, or r below it and A negative, and only there. DAPO's clip-higher
    (arXiv 2503.14476, section 3.1) sets the bounds apart.
    """
    advantages = advantages[:, None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.minimum(ratio * advantages, clipped * advantages)


def k3(logp: PerToken, other_logp: PerToken, mask: PerToken) -> PerToken:
    """The k3 estimate of KL(policy || other) on the policy's samples, e^d - d - 1 >= 0 with d =
    log other - log policy (Schulman 2020; GRPO, arXiv 2402.03300, eq. 4); 0 where the mask is.

    Its mean over samples of the policy is the divergence. Its gradient, samples held fixed, is not:
    the mean of it is the gradient of KL(other || policy). Times the ratio of the policy to the one
    that was sampled from (``k3_weighted``; DeepSeek-V3.2, arXiv 2512.02556, section 3.1), it is
    that of KL(policy || other). The default follows the recipes, which have it unweighted; both
    pull the policy to the same place.
    """
    d = _where(mask, other_logp - logp)
    d = jnp.clip(d, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return jnp.expm1(d) - d


def truncated_weights(
    old_logp: PerToken, sampler_logp: PerToken, mask: PerToken, cap: float
) -> PerToken:
    """min(old / sampler, cap) of each token, without gradient: truncated importance sampling.

    The sampler's probabilities differ from those that the trainer computes with the same weights
    (other kernels, BF16, other experts chosen), which makes sampled tokens off-policy (Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training"; they cap at 2).
    """
    ratio = jnp.exp(log_ratio(old_logp, sampler_logp, mask, "token"))
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def gap_metrics(
    trainer_logp: PerToken, sampler_logp: PerToken, mask: PerToken, bound: float = GAP_BOUND
) -> Metrics:
    """How far the sampler's log-probabilities are from the trainer's, for the same weights.

    Returns:
      ``gap/mean`` and ``gap/max`` of the absolute difference in nats, ``gap/k3`` (estimate of
      KL(sampler || trainer), the tokens being the sampler's), ``gap/share_beyond``: of tokens that
      differ by more than ``bound``.
    """
    gap = jnp.abs(_where(mask, trainer_logp - sampler_logp))
    mean = lambda values: aggregate(values, mask, "token_mean")
    return {
        "gap/mean": mean(gap),
        "gap/max": jnp.max(gap),
        "gap/k3": mean(k3(sampler_logp, trainer_logp, mask)),
        "gap/share_beyond": mean((gap > bound).astype(jnp.float32)),
    }


def policy_loss(
    config: RLConfig,
    logp: PerToken,
    old_logp: PerToken | None,
    sampler_logp: PerToken | None,
    reference_logp: PerToken | None,
    advantages: Float[Array, " B"],
    mask: PerToken,
    *,
    entropy: PerToken | None = None,
    max_length: int = 0,
    totals: Totals | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a policy's update, to be minimized, and what to look at beside it.

    Each token's loss is ``- weight * surrogate + kl_weight * KL - entropy_weight * entropy``; the
    weight is that of truncated importance sampling, or 1. Only ``logp`` and ``entropy`` have a
    gradient.

    Args:
      config: the options; need not be resolved.
      logp: the policy's log-probabilities.
      old_logp: those before this rollout's updates, from the trainer; None where this is the first
        update, and they are ``logp`` themselves.
      sampler_logp: those that the sampler had; None where they were not kept.
      reference_logp: the reference's; None without a KL term.
      advantages: of each response.
      mask: 1 for the responses' tokens.
      entropy: the policy's at each position; None without an entropy bonus.
      max_length: longest length allowed, for ``aggregate = 'constant'``.
      totals: of the whole batch, where this is a part of one. Losses of the parts add up to the
        whole's; so do the metrics ``surrogate``, ``kl`` and ``entropy``, but no others.

    Returns:
      The loss, and metrics without gradient. ``clip/low`` and ``clip/high`` are the shares of
      tokens (of responses, where the ratio is the sequence's) whose gradient a bound takes away.

    Raises:
      ValueError: the config needs an array that is None.
    """
    config = config.resolved()
    _check_given(config, reference_logp, entropy, sampler_logp)
    old_logp = jax.lax.stop_gradient(logp if old_logp is None else old_logp)
    combine = lambda values: aggregate(values, mask, config.aggregate, max_length, totals)

    ratio = jnp.exp(log_ratio(logp, old_logp, mask, config.ratio))
    surrogate = clipped_surrogate(ratio, advantages, config.clip_low, config.clip_high)
    metrics = _ratio_metrics(config, ratio, logp, old_logp, advantages, mask)
    if sampler_logp is not None:
        metrics |= gap_metrics(old_logp, sampler_logp, mask)
    if config.truncated_is:
        weights = truncated_weights(old_logp, sampler_logp, mask, config.truncated_is)
        surrogate *= weights
        capped = (weights >= config.truncated_is).astype(jnp.float32)
        metrics["truncated_is/mean"] = aggregate(weights, mask, "token_mean")
        metrics["truncated_is/capped"] = aggregate(capped, mask, "token_mean")
    metrics["surrogate"] = combine(surrogate)
    loss = -metrics["surrogate"]
    if config.kl_weight:
        metrics["kl"] = combine(_kl(config, logp, old_logp, reference_logp, mask))
        loss += config.kl_weight * metrics["kl"]
    if entropy is not None:
        metrics["entropy"] = combine(_where(mask, entropy))
        if config.entropy_weight:
            loss -= config.entropy_weight * metrics["entropy"]
    return loss, jax.lax.stop_gradient(metrics | {"loss": loss})


def _check_given(config: RLConfig, reference_logp, entropy, sampler_logp) -> None:
    for needed, array, name in (
        (config.kl_weight, reference_logp, "reference_logp"),
        (config.entropy_weight, entropy, "entropy"),
        (config.truncated_is, sampler_logp, "sampler_logp"),
    ):
        if needed and array is None:
            raise ValueError(f"the config needs {name}, which is None")


def _kl(config: RLConfig, logp, old_logp, reference_logp, mask) -> PerToken:
    kl = k3(logp, jax.lax.stop_gradient(reference_logp), mask)
    if config.kl_estimate == "k3_weighted":
        kl *= jnp.exp(log_ratio(logp, old_logp, mask, "token"))
    return kl


def _ratio_metrics(config: RLConfig, ratio, logp, old_logp, advantages, mask) -> Metrics:
    # A sequence's ratio stands at each of its tokens: the mean over responses counts it once.
    form = "token_mean" if config.ratio == "token" else "sequence_mean"
    mean = lambda values: aggregate(values.astype(jnp.float32), mask, form)
    sign = jnp.sign(advantages)[:, None]
    return {
        "clip/low": mean((ratio < 1 - config.clip_low) & (sign < 0)),
        "clip/high": mean((ratio > 1 + config.clip_high) & (sign > 0)),
        "ratio/mean": mean(ratio),
        "ratio/max": jnp.max(_where(mask, ratio)),
        "old_kl": aggregate(k3(old_logp, logp, mask), mask, "token_mean"),
        "response_length": jnp.sum(mask) / jnp.maximum(Totals.of(mask).responses, 1),
    }


def _where(mask: PerToken, values: PerToken) -> PerToken:
    """The values where the mask is set, 0 elsewhere."""
    return jnp.where(mask > 0, values, 0.0)
