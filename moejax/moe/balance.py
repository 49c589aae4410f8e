"""Balance losses, and what else keeps a router in shape. All in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def load_fractions(
    expert: Int[Array, "*batch S K"], valid: Bool[Array, "*batch S"], num_experts: int
) -> Float[Array, "*batch E"]:
    """Share of the assignments that each expert gets, c_i / (K T); sums to 1 over the experts.

    Indices of E and above are no assignments. Rows without one give zeros. Not differentiable.
    """
    # Counted, not summed over one-hot vectors: a list may be as wide as there are experts.
    seen = jnp.where(valid[..., None], expert, num_experts)
    rows = jnp.minimum(seen, num_experts).reshape(-1, expert.shape[-2] * expert.shape[-1])
    counts = jax.vmap(lambda row: jnp.bincount(row, length=num_experts + 1)[:num_experts])(rows)
    counts = counts.reshape(*expert.shape[:-2], num_experts).astype(jnp.float32)
    total = jnp.sum(counts, axis=-1, keepdims=True)
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
    return mean_of_rows(losses, valid)


def mean_of_rows(values: Float[Array, " B"], valid: Bool[Array, "B S"]) -> Float[Array, ""]:
    """Mean over the rows that hold a token."""
    rows = jnp.any(valid, axis=-1)
    return jnp.sum(values * rows) / jnp.maximum(jnp.sum(rows), 1)


def z_loss(logits: Float[Array, "T E"], valid: Bool[Array, " T"]) -> Float[Array, ""]:
    """Mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    squared = jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(squared * valid) / jnp.maximum(jnp.sum(valid), 1)


def group_balance_loss(
    fractions: Float[Array, "*batch E"], probabilities: Float[Array, "*batch E"], groups: int
) -> Float[Array, "*batch"]:
    """The balance of groups of neighbouring experts (devices): 1 where groups are balanced.

    G · sum over groups of (share of the assignments) · (sum of P in the group).

    Source: DeepSeek-V2 (arXiv 2405.04434, eq. 26 to 28), the device-level balance loss.
    """
    per_group = lambda values: jnp.sum(values.reshape(*values.shape[:-1], groups, -1), axis=-1)
    return groups * jnp.sum(per_group(fractions) * per_group(probabilities), axis=-1)


def communication_loss(
    expert: Int[Array, "B S K"],
    probabilities: Float[Array, "B S E"],
    valid: Bool[Array, "B S"],
    groups: int,
    groups_kept: int,
) -> Float[Array, " B"]:
    """The balance of what each device receives, by row: 1 where all receive the same.

    sum over devices of f'' P'', f'' = (G / (M S)) · tokens sent there, P'' the sum of P on it.

    Source: DeepSeek-V2 (arXiv 2405.04434, eq. 29 to 31), with M devices a token at most.
    """
    size = probabilities.shape[-1] // groups
    sent = jnp.any(jax.nn.one_hot(expert // size, groups, dtype=bool), axis=-2)
    tokens = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    received = jnp.sum(sent & valid[..., None], axis=-2) * groups / (groups_kept * tokens)
    mean = mean_probabilities(probabilities, valid)
    mass = jnp.sum(mean.reshape(*mean.shape[:-1], groups, size), axis=-1)
    return jnp.sum(jax.lax.stop_gradient(received) * mass, axis=-1)


def squared_variation(values: Float[Array, " E"]) -> Float[Array, ""]:
    """Squared coefficient of variation, variance over squared mean: 0 where all are equal.

    Source: Shazeer et al. (arXiv 1701.06538, eq. 6 to 11): of the summed gates it is the
    importance loss, of the expected assignments the load loss.
    """
    return jnp.var(values) / (jnp.mean(values) ** 2 + 1e-10)


def importance_loss(
    expert: Int[Array, "R K"], gate: Float[Array, "R K"], num_experts: int
) -> Float[Array, ""]:
    """Squared variation of the experts' summed gates (arXiv 1701.06538, eq. 6 and 7)."""
    sums = jnp.zeros(num_experts + 1).at[expert.reshape(-1)].add(gate.reshape(-1))
    return squared_variation(sums[:num_experts])


def orthogonal_loss(kernel: Float[Array, "D E"]) -> Float[Array, ""]:
    """Squared distance of the experts' cosines from the unit matrix, over E pairs.

    sum_ij (cos(w_i, w_j) - [i = j])² / E: 0 exactly where the router's columns are orthogonal.

    Source: ERNIE 4.5 technical report, router orthogonalization loss; its weight is 1e-2.
    """
    unit = kernel / (jnp.linalg.norm(kernel, axis=0, keepdims=True) + 1e-20)
    excess = unit.T @ unit - jnp.eye(kernel.shape[1])
    return jnp.sum(excess**2) / kernel.shape[1]


def similarity_loss(kernel: Float[Array, "D E"]) -> Float[Array, ""]:
    """Sum of |W'W - 1| entries over E: 0 exactly where the columns are orthonormal.

    Source: SimBal (arXiv 2506.14038, eq. 6); its weight is 0.1. Divided by E here, so that it
    does not grow with the number of experts.
    """
    return jnp.sum(jnp.abs(kernel.T @ kernel - jnp.eye(kernel.shape[1]))) / kernel.shape[1]
