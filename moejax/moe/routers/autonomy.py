"""Autonomy of experts: no router; the experts' own first activations say who is chosen."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import check
from moejax.moe import rowwise
from moejax.moe.routers.base import Card, RouterCounts, RouterInputs, Routing
from moejax.moe.routers.losses import LossOptions, ScoredRouter, check_no_kernel_losses

# Activations that live at once, as numbers; more experts' are taken one block after another.
BLOCK = 2**24


@dataclasses.dataclass(frozen=True)
class AutonomyOptions(LossOptions):
    """Defaults are the paper's: the balance loss at 0.01. Set ``moe.gate_rank``."""

    needs_gate_rank: ClassVar[bool] = True

    name: str = "autonomy"
    balance_loss_weight: float = 0.01

    @property
    def needs_full_width(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_kernel_losses(self)

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        """Without parameters of its own. Its FLOPs, 2 · E · D · ``moe.gate_rank``, are added by
        ``moejax.cost.counts``, since the rank is the experts'."""
        return RouterCounts(0, 0.0, float(top_k))


class AutonomyRouter(ScoredRouter):
    """Top-k by the norm of each expert's first low-rank activation x A_i; no parameters.

    The experts' gate projection is A_i B_i, of rank ``moe.gate_rank``. Gates are the softmax of all
    E norms, of the chosen; the balance loss takes it as probabilities. All experts compute x A_i
    for every token; the dispatchers use A_i B_i multiplied out, so that of the chosen x A_i is
    computed twice, once in float32. The norms of several experts at a time, no more than fit into
    2²⁴ numbers, and anew for the backward pass. Stateless, causal.

    Source: Autonomy-of-experts (arXiv 2501.13074), as its author gives it in arXiv 2512.23447,
    section 2; the balance loss is Switch's.

    Raises:
      ConfigError: experts without a rank.
    """

    Options: ClassVar = AutonomyOptions
    card: ClassVar = Card(
        "top-k by the norm of each expert's own low-rank activation, no router",
        "Autonomy of experts, 2501.13074", "", "experts that choose their tokens",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        x = inputs.x.reshape(-1, inputs.x.shape[-1])
        first = inputs.experts.low_rank if inputs.experts else None
        check(first is not None, "moe.gate_rank", 0, "gives experts no low-rank part; set a rank")
        norms = activation_norms(x, first)
        p = jax.nn.softmax(norms, axis=-1)
        gate, expert = rowwise.top_k(p, self.top_k)
        return self.decide(inputs, norms, p, expert, gate)


def activation_norms(x: Float[Array, "T D"], first: Float[Array, "E D r"]) -> Float[Array, "T E"]:
    """|x A_i| of every token and expert, in float32."""
    count, width, rank = first.shape
    x, first = x.astype(jnp.float32), first.astype(jnp.float32)

    @jax.checkpoint
    def norms(part: Float[Array, "e D r"]) -> Float[Array, "T e"]:
        answers = jnp.einsum("td,edr->ter", x, part, precision=jax.lax.Precision.HIGHEST)
        # The small number keeps the gradient of a token of zeros finite.
        return jnp.sqrt(jnp.sum(answers**2, axis=-1) + 1e-20)

    fits = max(1, BLOCK // (len(x) * rank))
    size = max(size for size in range(1, count + 1) if count % size == 0 and size <= fits)
    if size == count:
        return norms(first)
    parts = jax.lax.map(norms, first.reshape(-1, size, width, rank))
    return parts.swapaxes(0, 1).reshape(len(x), count)
