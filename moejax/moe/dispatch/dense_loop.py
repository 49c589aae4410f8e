"""The reference: every expert over every token, one expert after another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.experts import ExpertWeights, activate


def dense_loop(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "T D"]:
    """Sums each expert's output over all tokens, weighted by its gate where it was chosen.

    E / K times the work of the other dispatchers, and nothing that can go wrong.

    Args:
      x: token vectors.
      expert: chosen experts; indices of E and above are computed by nobody here.
      gate: combine weights.
      weights: the experts.

    Returns:
      The combined outputs.
    """

    def add(total, item):
        index, one = item
        weight = jnp.sum(jnp.where(expert == index, gate, 0.0), axis=-1)
        both = jnp.einsum("td,dgf->tgf", x, one.gate_up)
        if one.gate_up_bias is not None:
            both += one.gate_up_bias[None]
        y = jnp.matmul(activate(one.activation, both), one.down)
        if one.down_bias is not None:
            y += one.down_bias[None]
        return total + weight[:, None].astype(x.dtype) * y, None

    items = jnp.arange(weights.num_experts), weights
    total, _ = jax.lax.scan(add, jnp.zeros_like(x), items)
    return total
