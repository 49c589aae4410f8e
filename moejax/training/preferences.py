"""Learning from pairs of responses, of which one is preferred: DPO (block ``preferences``)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import check, check_not_negative, check_positive

Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Options of direct preference optimization.

    The defaults are DPO (arXiv 2305.18290). SimPO (arXiv 2405.14734, eq. 6) is ``reference_free``
    and ``length_normalized``, with a ``beta`` of 2 to 2.5 and a ``margin`` of about half of it.
    DPO widens the difference even where both responses become unlikely; ``chosen_weight`` holds the
    preferred one, as arXiv 2404.19733 does.

    Attributes:
      beta: strength of the pull to the reference; what log-ratios are multiplied by.
      label_smoothing: share of pairs supposed to be labelled the wrong way round, below 0.5
        (conservative DPO, Mitchell 2023).
      reference_free: leave the reference out.
      length_normalized: a response's score is the mean over its tokens, not the sum.
      margin: what the preferred response's reward has to exceed the other's by.
      chosen_weight: of the preferred response's cross-entropy, its mean over tokens.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    length_normalized: bool = False
    margin: float = 0.0
    chosen_weight: float = 0.0

    def __post_init__(self) -> None:
        check_positive("preferences", self, "beta")
        check_not_negative("preferences", self, "label_smoothing", "margin", "chosen_weight")
        check(
            self.label_smoothing < 0.5, "preferences.label_smoothing", self.label_smoothing,
            "must be below 0.5: from there on, labels say nothing or the opposite",
        )  # fmt: skip


def response_log_probs(
    logp: Float[Array, "B S"], mask: Float[Array, "B S"], mean: bool = False
) -> Float[Array, " B"]:
    """Sum, or mean, of the log-probabilities of each response's tokens.

    What stands where the mask is 0, NaN included, changes nothing.
    """
    total = jnp.sum(jnp.where(mask > 0, logp, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1) if mean else total


def preference_loss(
    config: PreferenceConfig,
    chosen_logp: Float[Array, "B S"],
    rejected_logp: Float[Array, "B S"],
    chosen_mask: Float[Array, "B S"],
    rejected_mask: Float[Array, "B S"],
    chosen_reference: Float[Array, "B S"] | None = None,
    rejected_reference: Float[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """DPO's loss (arXiv 2305.18290, eq. 7), the mean over pairs.

    It is -log sigmoid(z), z = beta (log-ratio of the chosen response to the reference less that of
    the rejected one) - margin, and with label smoothing e: -(1 - e) log sigmoid(z) -
    e log sigmoid(-z); to which ``chosen_weight`` adds the mean cross-entropy of the chosen
    response's tokens. Row b of all arrays is one pair.

    Args:
      config: the options.
      chosen_logp: log-probabilities of the preferred responses' tokens.
      rejected_logp: of the other responses' tokens; its S may be another.
      chosen_mask: 1 for the preferred responses' tokens.
      rejected_mask: 1 for the others'.
      chosen_reference: the reference's log-probabilities; no gradient. None if ``reference_free``.
      rejected_reference: as ``chosen_reference``.

    Returns:
      The loss, and metrics without gradient: ``loss``, ``chosen_nll`` (cross-entropy of the chosen
      response, nats a token), ``reward/chosen`` and ``reward/rejected`` (beta times the
      log-ratios), ``reward/margin`` (their difference), ``accuracy`` (share of pairs in which the
      chosen response's reward is the larger).

    Raises:
      ValueError: a reference is needed and is None.
    """
    score = lambda logp, mask: response_log_probs(logp, mask, config.length_normalized)
    chosen = score(chosen_logp, chosen_mask)
    rejected = score(rejected_logp, rejected_mask)
    if not config.reference_free:
        if chosen_reference is None or rejected_reference is None:
            raise ValueError("log-probabilities of the reference are needed: reference_free is off")
        chosen -= jax.lax.stop_gradient(score(chosen_reference, chosen_mask))
        rejected -= jax.lax.stop_gradient(score(rejected_reference, rejected_mask))
    chosen, rejected = config.beta * chosen, config.beta * rejected
    z, smoothing = chosen - rejected - config.margin, config.label_smoothing
    losses = -(1 - smoothing) * jax.nn.log_sigmoid(z) - smoothing * jax.nn.log_sigmoid(-z)
    nll = -response_log_probs(chosen_logp, chosen_mask, mean=True)
    if config.chosen_weight:
        losses += config.chosen_weight * nll
    loss = jnp.mean(losses)
    metrics = {
        "loss": loss,
        "chosen_nll": jnp.mean(nll),
        "reward/chosen": jnp.mean(chosen),
        "reward/rejected": jnp.mean(rejected),
        "reward/margin": jnp.mean(chosen - rejected),
        "accuracy": jnp.mean((chosen > rejected).astype(jnp.float32)),
    }
    return loss, jax.lax.stop_gradient(metrics)
