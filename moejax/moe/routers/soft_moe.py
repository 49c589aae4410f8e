"""Soft MoE: experts compute mixtures of a sequence's tokens."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config import check_positive
from moejax.moe.routers.base import (
    Card,
    Router,
    RouterCounts,
    RouterInputs,
    RouterOptions,
    Routing,
    project,
)
from moejax.moe.routers.rows import MixedRows


@dataclasses.dataclass(frozen=True)
class SoftMoEOptions(RouterOptions):
    """Defaults are the paper's: one slot an expert, to be used with many experts.

    Attributes:
      slots_per_expert: mixtures of each sequence that an expert computes. The router has a column
        for every slot, so their number cannot follow the sequence's length. Experts do as much as
        with top-k where it is sequence length · K / E.
    """

    leaks: ClassVar[bool] = True
    leaks_in_evaluation: ClassVar[bool] = True

    name: str = "soft_moe"
    slots_per_expert: int = 1

    def __post_init__(self) -> None:
        check_positive("router", self, "slots_per_expert")

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        """Logits, dispatch and combine; experts as if there were sequence · K / E slots."""
        slots = num_experts * self.slots_per_expert
        return RouterCounts(d_model * slots + 1, 6.0 * d_model * slots, float(top_k), measured=True)


class SoftMoERouter(Router):
    """Experts compute weighted means of a sequence's tokens; tokens get weighted means of those.

    Logits are the products of tokens and slots' columns, both of length 1, times a learned scale.
    A slot's input is the mean of the tokens by their softmax over tokens (dispatch), a token's
    output the mean of the slots' outputs by its softmax over all slots (combine). ``moe.top_k`` is
    not used: the work is E · ``slots_per_expert`` expert runs a sequence. Padding enters no slot.

    Leaks, in evaluation too: every output depends on every token of its sequence, and no causal
    form exists. Not for language models; the rows of a packed batch are mixed across documents.

    Source: Soft MoE (arXiv 2308.00951, section 2.1, eq. 1 and 2, and section 2.3 for the lengths
    and the scale) and its released code, whose 1e-6 under the root is kept.
    """

    Options: ClassVar[type[RouterOptions]] = SoftMoEOptions
    card: ClassVar[Card] = Card(
        "experts compute softmax mixtures of a sequence's tokens", "Soft MoE, 2308.00951", "",
        "encoders: differentiable, nothing dropped; leaks always",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        slots, x = self.options.slots_per_expert, inputs.x.astype(jnp.float32)
        count = self.num_experts * slots
        kernel = self.matrix("kernel", (x.shape[-1], count), ("embed", "router_expert"))
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ())
        scale = self.param("scale", ones, (), jnp.float32)
        logits = project(of_length_one(x, -1), of_length_one(kernel, 0) * scale)
        dispatch, combine = mixtures(logits, inputs.valid)
        # An expert's slots stand side by side; rows without a token give its slots to nobody.
        owner = jnp.repeat(jnp.arange(self.num_experts, dtype=jnp.int32), slots)
        used = jnp.any(inputs.valid, axis=1)[:, None]
        expert = jnp.where(used, owner[None, :], self.num_experts).reshape(-1, 1)
        by_expert = lambda values: values.reshape(-1, self.num_experts, slots)
        return self.finish(
            inputs, jax.nn.logsumexp(by_expert(logits), axis=-1),
            jnp.sum(by_expert(combine), axis=-1), expert, jnp.ones(expert.shape, jnp.float32),
            rows=MixedRows(dispatch, combine),
        )  # fmt: skip


def mixtures(
    logits: Float[Array, "B S R"], valid: Bool[Array, "B S"]
) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
    """Dispatch, which sums to 1 over a row's valid tokens, and combine, to 1 over the slots."""
    real = valid[..., None]
    # Finite, so that a row of padding alone has no 0 / 0 in it.
    dispatch = jax.nn.softmax(jnp.where(real, logits, -1e30), axis=1)
    combine = jax.nn.softmax(logits, axis=2)
    return jnp.where(real, dispatch, 0.0), jnp.where(real, combine, 0.0)


def of_length_one(values: Float[Array, "*shape"], axis: int) -> Float[Array, "*shape"]:
    """Vectors along an axis over their length; zero stays zero."""
    return values * jax.lax.rsqrt(jnp.sum(values**2, axis=axis, keepdims=True) + 1e-6)
