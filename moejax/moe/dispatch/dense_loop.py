"""The reference: every expert over every token, one expert after another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.experts import ExpertWeights, activate, first_product
from moejax.numerics.fp8 import held_matmul


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
        weight = weight[:, None].astype(x.dtype)
        both = first_product(x, one.gate_up, one.precision)
        if one.gate_up_bias is not None:
            both += one.gate_up_bias[None]
        hidden = activate(one.activation, both)
        if one.precision == "fp8":
            # The gate first, as in the other dispatchers: tiles along the tokens depend on it.
            y = held_matmul(hidden * weight, one.down)
            return total + (y if one.down_bias is None else y + weight * one.down_bias[None]), None
        y = jnp.matmul(hidden, one.down)
        if one.down_bias is not None:
            y += one.down_bias[None]
        return total + weight * y, None

    items = jnp.arange(weights.num_experts), weights
    total, _ = jax.lax.scan(add, jnp.zeros_like(x), items)
    return total
