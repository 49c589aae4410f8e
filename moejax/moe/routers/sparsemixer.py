"""SparseMixer-v2: experts are sampled, and the router's gradient is estimated by an ODE's rule."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import check, check_not_negative
from moejax.moe.routers.base import Card, RouterInputs, Routing
from moejax.moe.routers.losses import LossOptions, ScoredRouter


@dataclasses.dataclass(frozen=True)
class SparseMixerOptions(LossOptions):
    """Defaults are those of Phi-3.5-MoE's config class in Transformers.

    Attributes:
      margin: experts whose logit lies further below the best than twice this share of its size
        cannot be chosen (``router_jitter_noise`` there).
    """

    name: str = "sparsemixer"
    margin: float = 0.01
    balance_loss_weight: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("router", self, "margin")

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            top_k in (1, 2), "moe.top_k", top_k,
            "router sparsemixer is defined for 1 and 2; choose one of them, or another router",
        )  # fmt: skip


class SparseMixerRouter(ScoredRouter):
    """One expert after the other, sampled from a softmax over those near the best.

    For each choice: p = softmax of the logits that are near the largest, the experts chosen before
    left out. Training samples from p, evaluation takes the largest. The gate is p of the chosen,
    times a third with probability 3/4 where the sample is not the largest: Heun's third-order rule,
    f(1) - f(0) = f'(1/3) · 3/4 + f'(1) / 4, which the chain rule then turns into an estimate of the
    router's gradient through the choice itself. The gradient of the gate is that of p alone. The
    gates of the two choices do not sum to 1: each is near 1 where no other expert is near.

    Source: GRIN (arXiv 2409.12136, section 2) and its released code, also in Transformers
    (``phimoe``), where 1/3 is rounded to 0.3333. Phi-3.5-MoE's noise on the whole block's input is
    no part of the router and left out. Causal.
    """

    Options: ClassVar[type[SparseMixerOptions]] = SparseMixerOptions
    card: ClassVar[Card] = Card(
        "experts sampled one by one among the best, gradient by Heun's rule", "GRIN, 2409.12136",
        "", "a router's gradient that sees the choice",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        taken = jnp.zeros(logits.shape, bool)
        keys = [None] * self.top_k
        if inputs.train:
            keys = jax.random.split(self.make_rng("router"), self.top_k)
        experts, gate = [], []
        for key in keys:
            near = near_best(logits, taken, self.options.margin)
            expert, value = choose(logits, near, key)
            taken |= jnp.arange(logits.shape[-1])[None, :] == expert[:, None]
            experts.append(expert)
            gate.append(value)
        return self.decide(
            inputs, logits, jax.nn.softmax(logits, axis=-1), jnp.stack(experts, axis=-1),
            jnp.stack(gate, axis=-1),
        )  # fmt: skip


def near_best(
    logits: Float[Array, "T E"], taken: Bool[Array, "T E"], margin: float
) -> Bool[Array, "T E"]:
    """Experts not taken yet whose logit z is near the largest m of those.

    Near is m - z <= 2 · margin · max(|z|, m), so that the scale of the logits does not matter.
    """
    logits = jax.lax.stop_gradient(logits)
    best = jnp.max(jnp.where(taken, -jnp.inf, logits), axis=-1, keepdims=True)
    size = jnp.maximum(jnp.abs(logits), best)
    return ~taken & (best - logits <= 2 * margin * size)


def choose(
    logits: Float[Array, "T E"], near: Bool[Array, "T E"], key: Array | None
) -> tuple[Int[Array, " T"], Float[Array, " T"]]:
    """An expert of each token and its gate: sampled with a key, the best without.

    The gate's value is p or p / 3, its gradient that of p; see ``SparseMixerRouter``.
    """
    masked = jnp.where(near, logits, -jnp.inf)
    p = jax.nn.softmax(masked, axis=-1)
    of = lambda expert: jnp.take_along_axis(p, expert[:, None], axis=-1)[:, 0]
    best = jnp.argmax(masked, axis=-1)
    if key is None:
        return best, of(best)
    to_sample, to_scale = jax.random.split(key)
    noise = jax.random.gumbel(to_sample, logits.shape)
    expert = jnp.argmax(jax.lax.stop_gradient(masked) + noise, axis=-1)
    whole = (expert == best) | (jax.random.uniform(to_scale, expert.shape) > 0.75)
    value = of(expert)
    scaled = jax.lax.stop_gradient(value) * jnp.where(whole, 1.0, 1 / 3)
    # The difference is exactly 0, and passes p's gradient on.
    return expert, scaled + (value - jax.lax.stop_gradient(value))
