"""A router for measuring speed: every expert gets its fair share, whatever the tokens are.

Here is also how a router for measuring turns wanted loads into choices (``spread``), which
``trace`` shares.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moejax.moe.routers.base import Card, Router, RouterInputs, RouterOptions, Routing


@dataclasses.dataclass(frozen=True)
class ForceBalancedOptions(RouterOptions):
    """``force_balanced`` has no options of its own."""

    name: str = "force_balanced"


class MeasuringRouter(Router):
    """Base of the routers that choose experts by wanted loads instead of by tokens.

    The matrix is multiplied and trained all the same: gates are a softmax over the logits of the
    chosen experts, so that a step costs what a learned router's does; with K = 1 the gate is 1 and
    the matrix gets no gradient. There is no auxiliary loss. A subclass defines ``assignments``.

    Causal in the tokens: nobody's choice depends on any token. It does depend on where the padding
    is and on the shape of the batch, so that sampling one token after another does not repeat the
    choices of the whole text: this is for measuring, not for models that are to be used.
    """

    def assignments(self, inputs: RouterInputs, tokens: Int[Array, ""]) -> Int[Array, " E"]:
        """How many of the K · ``tokens`` assignments each expert gets; at most ``tokens``."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        tokens = jnp.sum(inputs.valid, dtype=jnp.int32)
        expert = spread(self.assignments(inputs, tokens), inputs.valid, self.top_k)
        gate = jax.nn.softmax(jnp.take_along_axis(logits, expert, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(logits, axis=-1)
        return self.finish(inputs, logits, probabilities, expert, gate)


class ForceBalancedRouter(MeasuringRouter):
    """Every expert gets the same number of the batch's assignments, up to one. Stateless.

    Speed with it is an upper bound: report it beside a learned router's, or ``trace``'s.
    """

    Options: ClassVar[type[RouterOptions]] = ForceBalancedOptions
    card: ClassVar[Card] = Card(
        "every expert the same number of tokens, whatever they are", "", "",
        "measuring speed: the upper bound",
    )  # fmt: skip

    def assignments(self, inputs: RouterInputs, tokens: Int[Array, ""]) -> Int[Array, " E"]:
        total = tokens * self.top_k
        index = jnp.arange(self.num_experts, dtype=jnp.int32)
        return total // self.num_experts + (index < total % self.num_experts)


def spread(counts: Int[Array, " E"], valid: Bool[Array, "B S"], top_k: int) -> Int[Array, "T K"]:
    """Distinct experts for every valid token, each expert as often as wanted.

    Systematic sampling: the assignments lie in one line, an expert's side by side, and the token of
    rank r takes the places r, r + n, r + 2n, ... of n valid tokens. An expert that has at most n
    places meets no token twice. Ranks run over positions in a pseudo-random order and, at one
    position, over rows: neighbours' experts have nothing to do with one another, and every full row
    has its share of each expert, up to one a choice. Experts stand on the line in a pseudo-random
    order, so that a token's K are not evenly spaced over the devices. The same counts and padding
    always give the same choices; there is no random number generator at run time.

    Args:
      counts: wanted assignments, each at most n; they sum to K · n.
      valid: False for padding.
      top_k: K.

    Returns:
      Expert indices below E; those of padding mean nothing.
    """
    batch, length = valid.shape
    # RandomState's streams never change between NumPy versions; sizes are static, so these are
    # constants of the program, of S and of E integers.
    place = np.random.RandomState(0).permutation(length)
    line = np.random.RandomState(1).permutation(len(counts)).astype(np.int32)
    in_order = valid[:, np.argsort(place)].T.reshape(-1)
    rank = jnp.cumsum(in_order, dtype=jnp.int32).reshape(length, batch).T[:, place] - 1
    tokens = jnp.sum(valid, dtype=jnp.int32)
    at = rank.reshape(-1, 1) + tokens * jnp.arange(top_k, dtype=jnp.int32)[None, :]
    ends = jnp.cumsum(counts[line])
    owner = jnp.searchsorted(ends, at, side="right")
    return jnp.asarray(line)[jnp.minimum(owner, len(counts) - 1)]
