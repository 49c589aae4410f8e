"""Balance losses and the rule that moves a selection bias. All in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def load_fractions(
    expert: Int[Array, "*batch S K"], valid: Bool[Array, "*batch S"], num_experts: int
) -> Float[Array, "*batch E"]:
    """Share of the assignments that each expert gets, c_i / (K T); sums to 1 over the experts.

    Rows without a valid token give zeros. Not differentiable.
    """
    one_hot = jax.nn.one_hot(expert, num_experts, dtype=jnp.float32).sum(axis=-2)
    counts = jnp.sum(one_hot * valid[..., None], axis=-2)
    total = expert.shape[-1] * jnp.sum(valid, axis=-1, keepdims=True)
    return jax.lax.stop_gradient(counts / jnp.maximum(total, 1))


def mean_probabilities(
    probabilities: Float[Array, "*batch S E"], valid: Bool[Array, "*batch S"]
) -> Float[Array, "*batch E"]:
    """Mean of the routing probabilities over the valid tokens of each row."""
    total = jnp.sum(probabilities * valid[..., None], axis=-2)
    return total / jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)


def switch_balance_loss(
    fractions: Float[Array, "*batch E"], probabilities: Float[Array, "*batch E"]
) -> Float[Array, "*batch"]:
    """E · sum_i f_i P_i, with f_i = c_i / (K T): exactly 1 where f or P is uniform.

    Source: Switch Transformers (arXiv 2101.03961, eq. 4 to 6), there for K = 1. For larger K, f is
    divided by K here, so that balance is 1 for every K; Hugging Face and MaxText leave that out.
    """
    return fractions.shape[-1] * jnp.sum(fractions * probabilities, axis=-1)


def sequence_balance_loss(
    expert: Int[Array, "B S K"],
    probabilities: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
) -> Float[Array, ""]:
    """The balance loss of each row by itself, averaged over the rows that hold a token.

    Source: DeepSeek-V3 (arXiv 2412.19437, eq. 17 to 20); ``probabilities`` are the scores
    normalised over the experts. A row of packed documents counts as one sequence.
    """
    fractions = load_fractions(expert, valid, probabilities.shape[-1])
    losses = switch_balance_loss(fractions, mean_probabilities(probabilities, valid))
    rows = jnp.any(valid, axis=-1)
    return jnp.sum(losses * rows) / jnp.maximum(jnp.sum(rows), 1)


def z_loss(logits: Float[Array, "T E"], valid: Bool[Array, " T"]) -> Float[Array, ""]:
    """Mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    squared = jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(squared * valid) / jnp.maximum(jnp.sum(valid), 1)


def sign_bias_update(
    bias: Float[Array, "*layers E"], load: Float[Array, "*layers E"], step: float
) -> Float[Array, "*layers E"]:
    """b_i + step · sign(mean load - load_i): an overloaded expert becomes less attractive.

    Source: loss-free balancing (arXiv 2408.15664, algorithm 1), used by DeepSeek-V3.
    """
    return bias + step * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
