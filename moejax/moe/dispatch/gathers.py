"""Rows out of a table of tokens and back: two gathers, each the other's transpose."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def pack(
    values: Float[Array, "T W"], token: Int[Array, " M"], row: Int[Array, "T J"]
) -> Float[Array, "M W"]:
    """Row m is that of token[m], zeros where that is T or above. Its transpose is ``unpack``.

    Args:
      values: one vector a token.
      token: token of each row.
      row: the same seen from the tokens: each one's rows, M and above for none.
    """
    del row
    there = (token < len(values))[:, None]
    return jnp.where(there, values[jnp.minimum(token, len(values) - 1)], 0)


@jax.custom_vjp
def unpack(
    rows: Float[Array, "M W"], token: Int[Array, " M"], row: Int[Array, "T J"]
) -> Float[Array, "T W"]:
    """Sums, in float32, the rows that stand for each token. Its transpose is ``pack``.

    Args:
      rows: one vector a row.
      token: token of each row, T and above for none.
      row: rows of each token, M and above for none.
    """
    del token
    there = (row < len(rows))[:, :, None]
    each = jnp.where(there, rows[jnp.minimum(row, len(rows) - 1)], 0)
    return jnp.sum(each.astype(jnp.float32), axis=1).astype(rows.dtype)


# Autodiff would transpose either gather to a scatter-add.
pack.defvjp(
    lambda values, *plan: (pack(values, *plan), plan),
    lambda plan, d_rows: (unpack(d_rows, *plan), None, None),
)
unpack.defvjp(
    lambda rows, *plan: (unpack(rows, *plan), plan),
    lambda plan, d_values: (pack(d_values, *plan), None, None),
)
