"""X-MoE: routing on a low-dimensional hypersphere."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import check, check_not_negative, check_positive
from moejax.moe import rowwise
from moejax.moe.routers.base import Card, RouterCounts, RouterInputs, Routing, project
from moejax.moe.routers.losses import LossOptions, ScoredRouter
from moejax.moe.routers.top_k import gates


@dataclasses.dataclass(frozen=True)
class XMoEOptions(LossOptions):
    """Defaults are those of X-MoE's released code.

    Attributes:
      router_dim: dimension that tokens are projected to; 0 for half the number of experts (16 for
        32 there).
      temperature: what the cosines are divided by at the start; it is learned.
    """

    name: str = "x_moe"
    router_dim: int = 0
    temperature: float = 0.07
    balance_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("router", self, "router_dim")
        check_positive("router", self, "temperature")
        check(
            not self.coupling_loss_weight, "router.coupling_loss_weight",
            self.coupling_loss_weight,
            "couples router columns of the model's width, which x_moe's are not; set it to 0",
        )  # fmt: skip

    def width(self, num_experts: int) -> int:
        """The dimension of the hypersphere's space."""
        return self.router_dim or max(1, num_experts // 2)

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        matrices = self.width(num_experts) * (d_model + num_experts)
        return RouterCounts(matrices + 1, 2.0 * matrices, float(top_k))


class XMoERouter(ScoredRouter):
    """Top-k of the cosines of P x and the experts' embeddings; gates are softmax(cosine / tau).

    Cosines ignore the norms of tokens and embeddings, by which experts could win tokens and pull
    their representations together. The auxiliary losses and the reported entropy take tau where it
    started, so that no loss falls by tau alone.

    Source: X-MoE (arXiv 2204.09179, section 3), and its code in unilm and TorchScale: 0.07 and the
    fixed temperature of the loss are from there, and embeddings start orthogonal as there.
    Deviations: tau is learned as a factor on its start, at least 1e-4 as there; K is free where
    X-MoE has 1; TorchScale's later form, which leaves out tau and the norm of the token, is not
    followed. Causal.
    """

    Options: ClassVar[type[XMoEOptions]] = XMoEOptions
    card: ClassVar[Card] = Card(
        "cosines in a low dimension over a learned temperature, softmax, top-k",
        "X-MoE, 2204.09179", "", "against representations that collapse onto experts",
    )  # fmt: skip
    replays: ClassVar[bool] = True

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: XMoEOptions = self.options
        x = inputs.x.reshape(-1, inputs.x.shape[-1])
        width = o.width(self.num_experts)
        reduction = self.matrix("reduction", (x.shape[-1], width), ("embed", None))
        init = nn.with_logical_partitioning(
            nn.initializers.orthogonal(0.32), (None, "router_expert")
        )
        embeddings = self.param("kernel", init, (width, self.num_experts), jnp.float32)
        # Named as the scales of norms are: weight decay would pull it to 0.
        one = nn.with_logical_partitioning(nn.initializers.ones_init(), (None,))
        scale = self.param("scale", one, (1,), jnp.float32)
        cosine = project(unit(project(x, reduction), -1), unit(embeddings, 0))
        logits = cosine / jnp.maximum(o.temperature * scale, 1e-4)[None, :]
        expert = given = self.replayed(inputs)
        if given is None:
            expert = rowwise.top_k(jax.lax.stop_gradient(cosine), self.top_k)[1]
        gate = gates(jax.nn.softmax(logits, axis=-1), expert, False, partial=given is not None)
        probabilities = jax.nn.softmax(cosine / o.temperature, axis=-1)
        return self.decide(inputs, logits, probabilities, expert, gate)


def unit(vectors: Float[Array, "N M"], axis: int) -> Float[Array, "N M"]:
    """Vectors of norm 1; those shorter than 1e-4 are divided by that, and zero stays zero."""
    squared = jnp.sum(vectors**2, axis=axis, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-8))
