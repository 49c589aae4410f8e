"""DSelect-k: a sparse gate that is continuous and differentiable everywhere."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import check_positive
from moejax.moe.routers.adaptive import mean_of_tokens
from moejax.moe.routers.base import Card, RouterCounts, RouterInputs, Routing, project
from moejax.moe.routers.losses import LossOptions, ScoredRouter, check_no_kernel_losses


@dataclasses.dataclass(frozen=True)
class DSelectKOptions(LossOptions):
    """Selectors are ``moe.top_k`` in number: no token ends with more experts.

    Attributes:
      gamma: width of the smooth step: beyond gamma / 2 either way a bit is exactly 0 or 1.
      entropy_loss_weight: entropy of a token's selectors, which drives their bits to 0 or 1 and so
        decides how soon the gate is sparse. The paper tunes it by data set.
      reach_loss_weight: keeps selectors from codes that no expert has, where moe.num_experts is
        no power of two; 0 at codes that have one.
    """

    name: str = "dselect_k"
    gamma: float = 1.0
    entropy_loss_weight: float = 0.01
    reach_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("router", self, "gamma")
        check_no_kernel_losses(self)

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        columns = top_k * (code_bits(num_experts) + 1)
        return RouterCounts(
            (d_model + 1) * columns, 2.0 * d_model * columns, float(top_k), measured=True
        )


class DSelectKRouter(ScoredRouter):
    """K selectors, each a product of smooth-step bits over the experts' binary codes.

    Selector i has log2(E) bits S(z), z = W_i x + b_i, and gives expert e the product over the bits
    of S(z) or 1 - S(z), as e's code has 1 or 0: weights that sum to 1. The gate is the sum of the
    selectors times alpha = softmax(V x + c). S(z) = -2 z³ / gamma³ + 3 z / (2 gamma) + 1/2 between
    -gamma/2 and gamma/2, 0 below and 1 above. Once all bits are 0 or 1, at most K experts are on.
    Before that, all may be: the first steps are as dear as a dense layer's, and a bit that has
    become 0 or 1 gets no gradient from its own token. Stateless, causal.

    Where E is no power of two, codes of E and above belong to nobody: their weight is lost to the
    token, and a loss of 1 / (weight of the experts) - 1 pushes selectors back.

    Source: DSelect-k (arXiv 2106.03760) by its released code: gate by example, start of
    the weights and the losses. Deviation: both losses are means over tokens and sums over
    selectors, where the code sums over a batch.
    """

    Options: ClassVar = DSelectKOptions
    card: ClassVar = Card(
        "K selectors of smooth binary codes, weighed by a softmax", "DSelect-k, 2106.03760", "",
        "a sparse gate that is smooth in training",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: DSelectKOptions = self.options
        x = inputs.x.reshape(-1, inputs.x.shape[-1])
        bits = code_bits(self.num_experts)
        z = self._linear("code", x, self.top_k * bits, o.gamma / 100)
        alpha = jax.nn.softmax(self._linear("weight", x, self.top_k, 0.05), axis=-1)
        ones = smooth_step(z, o.gamma).reshape(-1, self.top_k, bits)
        selectors = decode(ones)[..., : self.num_experts]
        gate = jnp.sum(alpha[..., None] * selectors, axis=1)
        losses = {}
        if o.entropy_loss_weight:
            entropy = -jnp.sum(selectors * jnp.log(selectors + 1e-6), axis=(1, 2))
            losses["entropy"] = (o.entropy_loss_weight, mean_of_tokens(entropy, inputs))
        if o.reach_loss_weight and self.num_experts < 2**bits:
            missed = jnp.sum(1 / (jnp.sum(selectors, axis=-1) + 1e-6) - 1 / (1 + 1e-6), axis=-1)
            losses["reach"] = (o.reach_loss_weight, mean_of_tokens(missed, inputs))
        each = jnp.arange(self.num_experts, dtype=jnp.int32)[None, :]
        expert = jnp.where(gate > 0, each, self.num_experts)
        probabilities = gate / (jnp.sum(gate, axis=-1, keepdims=True) + 1e-9)
        return self.decide(inputs, jnp.log(gate + 1e-9), probabilities, expert, gate, losses)

    def _linear(self, name: str, x: Array, columns: int, bound: float) -> Float[Array, "T C"]:
        """A product with a bias; both start uniform within the bound, as in the source."""

        def start(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        boxed = lambda axes: nn.with_logical_partitioning(start, axes)
        kernel = self.param(
            f"{name}_kernel", boxed(("embed", None)), (x.shape[-1], columns), jnp.float32
        )
        return project(x, kernel) + self.param(
            f"{name}_bias", boxed((None, None)), (1, columns), jnp.float32
        )


def code_bits(num_experts: int) -> int:
    """Bits that tell so many experts apart, at least one."""
    return max(1, (num_experts - 1).bit_length())


def smooth_step(z: Float[Array, "..."], gamma: float) -> Float[Array, "..."]:
    """0 up to -gamma / 2, 1 from gamma / 2, and a cubic with zero slope at both ends between."""
    t = jnp.clip(z / gamma, -0.5, 0.5)
    return jnp.where(t >= 0.5, 1.0, jnp.where(t <= -0.5, 0.0, -2 * t**3 + 1.5 * t + 0.5))


def decode(ones: Float[Array, "T K bits"]) -> Float[Array, "T K codes"]:
    """Weight of each code: the product of its bits' weights, the first bit the highest."""
    weights = jnp.ones((*ones.shape[:-1], 1), ones.dtype)
    for bit in range(ones.shape[-1]):
        both = jnp.stack([1 - ones[..., bit], ones[..., bit]], axis=-1)
        weights = (weights[..., :, None] * both[..., None, :]).reshape(*ones.shape[:-1], -1)
    return weights
