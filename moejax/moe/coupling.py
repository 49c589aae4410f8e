"""Coupling of experts and router: each expert shall answer its own router column the loudest."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def coupling_loss(
    kernel: Float[Array, "D E"],
    gate: Float[Array, "E D F"],
    alpha: float,
    noise: Array | None = None,
) -> Float[Array, ""]:
    """How far other experts answer a router column louder than its own expert does, and back.

    Column i of the router, perturbed, stands for the tokens that expert i gets. M_ij is the norm of
    its product with expert j's gate projection, and the loss is the sum over i and j ≠ i of
    max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0), over E²: 0 where every diagonal entry
    times alpha is the largest of its row and of its column.

    The noise multiplies each entry by a uniform number from 1 - eps_i to 1 + eps_i, with eps_i
    half the distance to the nearest other column over the column's own norm, so that it stays in
    its cluster. No gradient flows into eps. E² F numbers live at once.

    Source: expert-router coupling loss (arXiv 2512.23447, eq. 1 to 4); weight and alpha there 1.

    Args:
      kernel: the router's matrix, one column an expert.
      gate: the experts' gate projections.
      alpha: from 0 to 1; the smaller, the more the experts have to differ.
      noise: a random key; None leaves the columns as they are.
    """
    experts = kernel.shape[1]
    if experts == 1:
        return jnp.zeros((), jnp.float32)
    proxy = kernel.T.astype(jnp.float32)
    if noise is not None:
        bound = noise_bound(jax.lax.stop_gradient(proxy))[:, None]
        proxy = proxy * (1 + bound * jax.random.uniform(noise, proxy.shape, minval=-1, maxval=1))
    answers = jnp.einsum(
        "id,jdf->ijf", proxy, gate.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    norms = jnp.sqrt(jnp.sum(answers**2, axis=-1) + 1e-20)
    own = alpha * jnp.diagonal(norms)
    excess = jax.nn.relu(norms - own[:, None]) + jax.nn.relu(norms - own[None, :])
    return jnp.sum(jnp.where(jnp.eye(experts, dtype=bool), 0.0, excess)) / experts**2


def noise_bound(proxy: Float[Array, "E D"]) -> Float[Array, " E"]:
    """Half the distance to the nearest other row over the row's own norm (eq. 4)."""
    squares = jnp.sum(proxy**2, axis=-1)
    products = jnp.matmul(proxy, proxy.T, precision=jax.lax.Precision.HIGHEST)
    distances = jnp.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    nearest = jnp.min(jnp.where(jnp.eye(len(proxy), dtype=bool), jnp.inf, distances), axis=-1)
    return jnp.sqrt(nearest) / (2 * jnp.sqrt(squares) + 1e-20)
