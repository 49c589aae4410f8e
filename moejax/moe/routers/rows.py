"""What the experts' rows are: tokens as they stand, or what a router makes of them.

A row is a vector that experts compute; a routing gives each row its experts and gates. Most routers
leave the tokens as they are. Others pick some of them (expert choice), mix them (Soft MoE) or scale
them (Llama 4). Neither the layer nor a dispatcher knows which: the layer calls ``enter`` before the
experts and ``leave`` after them. G groups of tokens, B rows of the batch each by itself or all of
them as one, never mix.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


class Rows(Protocol):
    """From tokens to the experts' rows and back."""

    def enter(self, x: Float[Array, "B S D"]) -> Float[Array, "G R D"]:
        """The rows that experts compute."""

    def leave(self, y: Float[Array, "G R D"], x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The tokens' outputs from the rows' combined ones; ``x`` gives shape and type."""

    def reached(self, used: Bool[Array, "G R"], shape: tuple[int, int]) -> Bool[Array, "B S"]:
        """The tokens that an expert computes, from the rows that one does."""


@struct.dataclass
class TokenRows:
    """Row r is token r."""

    def enter(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return x

    def leave(self, y: Float[Array, "B S D"], x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return y

    def reached(self, used: Bool[Array, "G R"], shape: tuple[int, int]) -> Bool[Array, "B S"]:
        return used.reshape(shape)


@struct.dataclass
class ScaledRows(TokenRows):
    """Row r is token r times a factor of its own: a gate on the experts' input.

    Attributes:
      scale: the factor of each token.
    """

    scale: Float[Array, "B S"]

    def enter(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return x * self.scale[..., None].astype(x.dtype)


@struct.dataclass
class GatheredRows:
    """Row r of a group is the token that it names; a token's outputs are the sum of its rows'.

    Attributes:
      token: a row's token within its group of B · S / G.
    """

    token: Int[Array, "G R"]

    def enter(self, x: Float[Array, "B S D"]) -> Float[Array, "G R D"]:
        groups = x.reshape(len(self.token), -1, x.shape[-1])
        return jnp.take_along_axis(groups, self.token[..., None], axis=1)

    def leave(self, y: Float[Array, "G R D"], x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        empty = jnp.zeros_like(x).reshape(len(self.token), -1, x.shape[-1])
        return jax.vmap(lambda sums, token, rows: sums.at[token].add(rows))(
            empty, self.token, y
        ).reshape(x.shape)

    def reached(self, used: Bool[Array, "G R"], shape: tuple[int, int]) -> Bool[Array, "B S"]:
        empty = jnp.zeros((len(self.token), shape[0] * shape[1] // len(self.token)), bool)
        used = used.reshape(self.token.shape)
        return jax.vmap(lambda sums, token, rows: sums.at[token].max(rows))(
            empty, self.token, used
        ).reshape(shape)


@struct.dataclass
class MixedRows:
    """Every row is a weighted sum of its group's tokens, every output one of the rows' outputs.

    Attributes:
      dispatch: weight of each token in each row.
      combine: weight of each row's output in each token's.
    """

    dispatch: Float[Array, "G N R"]
    combine: Float[Array, "G N R"]

    def enter(self, x: Float[Array, "B S D"]) -> Float[Array, "G R D"]:
        groups = x.reshape(*self.dispatch.shape[:2], x.shape[-1])
        return jnp.einsum("gnr,gnd->grd", self.dispatch.astype(x.dtype), groups)

    def leave(self, y: Float[Array, "G R D"], x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return jnp.einsum("gnr,grd->gnd", self.combine.astype(y.dtype), y).reshape(x.shape)

    def reached(self, used: Bool[Array, "G R"], shape: tuple[int, int]) -> Bool[Array, "B S"]:
        return jnp.any(self.combine > 0, axis=-1).reshape(shape)
