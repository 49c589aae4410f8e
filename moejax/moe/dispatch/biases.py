"""The experts' biases, where the dispatcher's own loops and kernels do not add them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.experts import ExpertWeights


def add_down_bias(
    y: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "T D"]:
    """Adds, for each token, its experts' last biases weighted by its gates.

    The sum over a token's experts is one product of (T, E) gates and (E, D) biases, so that neither
    pass adds up by index; E / (3 K F) of the experts' own work.

    Args:
      y: the experts' combined outputs without it.
      expert: chosen experts; indices of E and above are nobody's, and add nothing.
      gate: combine weights.
      weights: the experts.
    """
    if weights.down_bias is None:
        return y
    bias = weights.down_bias
    here = expert[:, :, None] == jnp.arange(len(bias), dtype=expert.dtype)[None, None, :]
    gates = jnp.sum(jnp.where(here, gate[:, :, None], 0), axis=1).astype(bias.dtype)
    total = jnp.matmul(gates, bias, preferred_element_type=jnp.float32)
    # A token that nobody computes may have any gradient, which must not reach the biases.
    computed = jnp.any(expert < len(bias), axis=1, keepdims=True)
    return (y + jnp.where(computed, total, 0)).astype(y.dtype)
