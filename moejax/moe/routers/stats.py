"""The sums that every router reports, from which ``moejax.moe.diagnostics`` tells its health."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def routing_stats(
    valid: Bool[Array, " T"],
    expert: Int[Array, "R K"],
    gate: Float[Array, "R K"],
    logits: Float[Array, "T N"],
    probabilities: Float[Array, "T N"],
    num_experts: int,
) -> dict[str, Array]:
    """Sums over valid tokens.

    Args:
      valid: False for padding.
      expert: chosen experts; E and above for none.
      gate: combine weights.
      logits: scores of each token.
      probabilities: the same, normalised over the choices.
      num_experts: E.

    Returns:
      ``load`` (E,) assignments of each expert, ``gate_mass`` (E,) their summed gates, and the
      scalars ``tokens``, ``assignments``, ``entropy`` (of the normalised scores, nats),
      ``squared_logsumexp`` and ``top1_margin``.
    """
    gate = jax.lax.stop_gradient(gate)
    load = assignment_counts(expert, num_experts)
    mass = jnp.zeros(num_experts + 1).at[expert.reshape(-1)].add(gate.reshape(-1))[:num_experts]
    weight = valid.astype(jnp.float32)
    entropy = -jnp.sum(probabilities * jnp.log(probabilities + 1e-20), axis=-1)
    # Not by top_k: slicing its result makes XLA on CPUs sort every row, at twenty times the cost.
    best = jnp.argmax(probabilities, axis=-1)
    is_best = jnp.arange(probabilities.shape[-1])[None, :] == best[:, None]
    second = jnp.max(jnp.where(is_best, 0.0, probabilities), axis=-1)
    return {
        "load": load,
        "gate_mass": mass,
        "tokens": jnp.sum(weight),
        "assignments": jnp.sum(load),
        "entropy": jnp.sum(weight * entropy),
        "squared_logsumexp": jnp.sum(weight * jax.nn.logsumexp(logits, axis=-1) ** 2),
        "top1_margin": jnp.sum(weight * (jnp.max(probabilities, axis=-1) - second)),
    }


def assignment_counts(expert: Int[Array, "*shape"], num_experts: int) -> Float[Array, " E"]:
    """Assignments of each expert; indices of E and above (padding) are not counted."""
    return jnp.bincount(expert.reshape(-1), length=num_experts + 1)[:num_experts].astype(
        jnp.float32
    )
