"""The experts' weights and arithmetic. They know nothing of routing."""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from moejax.numerics import Precision, held_weights, quantized_matmul
from moejax.numerics.fp8 import held_matmul

Activation = Literal["swiglu", "clamped_swiglu"]

# Of ``clamped_swiglu``, as in gpt-oss.
LIMIT, SLOPE = 7.0, 1.702


@struct.dataclass
class ExpertWeights:
    """Gated experts, stacked.

    Attributes:
      gate_up: gate and up projections side by side, for one product.
      down: down projections.
      gate_up_bias: added to the first product; None without biases.
      down_bias: added to the second, and so weighted by the gate.
      activation: between the two; see ``activate``.
      precision: of both products; see ``held_experts``.
    """

    gate_up: Float[Array, "E D 2 F"]
    down: Float[Array, "E F D"]
    gate_up_bias: Float[Array, "E 2 F"] | None = None
    down_bias: Float[Array, "E D"] | None = None
    activation: Activation = struct.field(pytree_node=False, default="swiglu")
    precision: Precision = struct.field(pytree_node=False, default="native")

    @property
    def num_experts(self) -> int:
        """How many experts these are."""
        return self.gate_up.shape[0]


class Experts(nn.Module):
    """Declares the weights of E gated experts and returns them in a compute type.

    With a ``gate_rank`` r the gate projection is a product of two factors, (D, r) and (r, F), which
    is multiplied out once a step: experts compute as always.

    Attributes:
      num_experts: E.
      width: hidden width F of one expert.
      init_std: deviation of the initial weights; 0 scales by each expert's own fan-in.
      gate_rank: r, or 0 for one full matrix.
      bias: both products have biases, which begin at zero.
      activation: between the products; see ``activate``.
    """

    num_experts: int
    width: int
    init_std: float = 0.0
    gate_rank: int = 0
    bias: bool = False
    activation: Activation = "swiglu"

    @nn.compact
    def __call__(
        self, d_model: int, dtype: jnp.dtype
    ) -> tuple[ExpertWeights, Float[Array, "E D r"] | None]:
        """The weights, and the gate's first factor in float32 where it is a product."""
        count, width, low_rank = self.num_experts, self.width, None
        if self.gate_rank:
            gate_up, low_rank = self._factored(d_model)
        else:
            gate_up = self.param(
                "gate_up",
                _init(self.init_std, ("expert", "embed", None, "mlp"), 1, (2, 3), (0,)),
                (count, d_model, 2, width),
                jnp.float32,
            )
        down = self.param(
            "down",
            _init(self.init_std, ("expert", "mlp", "embed"), 1, 2, (0,)),
            (count, width, d_model),
            jnp.float32,
        )
        gate_up, down, gate_up_bias, down_bias = jax.tree.map(
            lambda leaf: leaf.astype(dtype), (gate_up, down, *self._biases(d_model))
        )
        weights = ExpertWeights(gate_up, down, gate_up_bias, down_bias, self.activation)
        return weights, low_rank

    def _biases(self, d_model: int) -> tuple[Float[Array, "E 2 F"] | None, ...]:
        """Of the first product and of the second, (E, D); None where there are none."""
        if not self.bias:
            return None, None
        zeros = lambda name, axes, shape: self.param(
            name, nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, jnp.float32
        )
        count, width = self.num_experts, self.width
        return (
            zeros("gate_up_bias", ("expert", None, "mlp"), (count, 2, width)),
            zeros("down_bias", ("expert", "embed"), (count, d_model)),
        )

    def _factored(self, d_model: int) -> tuple[Float[Array, "E D 2 F"], Float[Array, "E D r"]]:
        """Gate and up with the gate multiplied out, and its first factor."""
        count, width, rank = self.num_experts, self.width, self.gate_rank
        matrix = lambda name, axes, shape: self.param(
            name, _init(self.init_std, axes, 1, 2, (0,)), shape, jnp.float32
        )
        first = matrix("gate_in", ("expert", "embed", None), (count, d_model, rank))
        second = matrix("gate_out", ("expert", None, "mlp"), (count, rank, width))
        up = matrix("up", ("expert", "embed", "mlp"), (count, d_model, width))
        return jnp.stack([jnp.einsum("edr,erf->edf", first, second), up], axis=2), first


class SwiGLU(nn.Module):
    """One expert that every token runs through: shared experts, and the dense layers.

    silu(x W_gate) · (x W_up), then W_down, without biases (arXiv 2002.05202, eq. 6).

    Attributes:
      width: hidden width.
      init_std: deviation of the initial weights; 0 scales by fan-in.
      precision: of the products.
    """

    width: int
    init_std: float = 0.0
    precision: Precision = "native"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        d_model = x.shape[-1]
        gate_up = self.param(
            "gate_up",
            _init(self.init_std, ("embed", None, "mlp"), 0, (1, 2)),
            (d_model, 2, self.width),
            jnp.float32,
        )
        down = self.param(
            "down", _init(self.init_std, ("mlp", "embed"), 0, 1), (self.width, d_model), jnp.float32
        )
        if self.precision == "fp8":
            # Two matrices, whose blocks are their own.
            both = jnp.stack([quantized_matmul(x, gate_up[:, i]) for i in range(2)], axis=-2)
            return quantized_matmul(swiglu(both), down)
        both = jnp.einsum("...d,dgf->...gf", x, gate_up.astype(x.dtype))
        return jnp.matmul(swiglu(both), down.astype(x.dtype))


def _init(std, axes, in_axis, out_axis, batch_axis=()):
    """An initializer with the logical names of its axes; see ``init_std`` above."""
    if std:
        init = nn.initializers.normal(std)
    else:
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis
        )
    return nn.with_logical_partitioning(init, axes)


def swiglu(both: Float[Array, "*rows 2 F"]) -> Float[Array, "*rows F"]:
    """silu(gate) · up, from the two side by side."""
    return jax.nn.silu(both[..., 0, :]) * both[..., 1, :]


def swiglu_gradient(
    both: Float[Array, "*rows 2 F"], d_hidden: Float[Array, "*rows F"]
) -> Float[Array, "*rows 2 F"]:
    """Gradient of ``swiglu`` with respect to its argument."""
    gate, up = both[..., 0, :], both[..., 1, :]
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
    return jnp.stack([d_gate, d_hidden * silu], axis=-2)


def clamped_swiglu(both: Float[Array, "*rows 2 F"]) -> Float[Array, "*rows F"]:
    """gate · sigmoid(1.702 · gate) · (up + 1); gate at most 7, up from -7 to 7 (gpt-oss)."""
    gate, up = both[..., 0, :], both[..., 1, :]
    # Selected, not clipped: at the limits themselves the gradient passes whole.
    gate = jnp.where(gate > LIMIT, LIMIT, gate)
    up = jnp.where(up > LIMIT, LIMIT, jnp.where(up < -LIMIT, -LIMIT, up))
    return gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)


def clamped_swiglu_gradient(
    both: Float[Array, "*rows 2 F"], d_hidden: Float[Array, "*rows F"]
) -> Float[Array, "*rows 2 F"]:
    """Gradient of ``clamped_swiglu`` with respect to its argument."""
    gate, up = jnp.minimum(both[..., 0, :], LIMIT), jnp.clip(both[..., 1, :], -LIMIT, LIMIT)
    sigmoid = jax.nn.sigmoid(SLOPE * gate)
    glu = gate * sigmoid
    d_gate = d_hidden * (up + 1) * (sigmoid + SLOPE * glu * (1 - sigmoid))
    d_both = jnp.stack([d_gate, d_hidden * glu], axis=-2)
    passed = jnp.stack([both[..., 0, :] <= LIMIT, jnp.abs(both[..., 1, :]) <= LIMIT], axis=-2)
    return jnp.where(passed, d_both, 0)


def activate(name: Activation, both: Float[Array, "*rows 2 F"]) -> Float[Array, "*rows F"]:
    """The activation by name: ``swiglu`` or ``clamped_swiglu``."""
    return {"swiglu": swiglu, "clamped_swiglu": clamped_swiglu}[name](both)


def activation_gradient(
    name: Activation, both: Float[Array, "*rows 2 F"], d_hidden: Float[Array, "*rows F"]
) -> Float[Array, "*rows 2 F"]:
    """Gradient of ``activate`` with respect to its argument."""
    gradients = {"swiglu": swiglu_gradient, "clamped_swiglu": clamped_swiglu_gradient}
    return gradients[name](both, d_hidden)


def held_experts(weights: ExpertWeights) -> ExpertWeights:
    """The experts as the FP8 recipe holds them: matrices in blocks, biases as they are, float32.

    What multiplies by them has to quantise its other operand, and its gradient: see
    ``moejax.numerics.fp8``.
    """
    biases = weights.gate_up_bias, weights.down_bias
    gate_up_bias, down_bias = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), biases)
    return weights.replace(
        gate_up=held_weights(weights.gate_up, (1, 3)), down=held_weights(weights.down, (1, 2)),
        gate_up_bias=gate_up_bias, down_bias=down_bias, precision="fp8",
    )  # fmt: skip


def first_product(
    rows: Float[Array, "R D"], weights: Float[Array, "D 2 F"], precision: Precision
) -> Float[Array, "R 2 F"]:
    """One expert's gate and up."""
    if precision == "fp8":
        return jnp.stack([held_matmul(rows, weights[:, i]) for i in range(2)], axis=1)
    return jnp.einsum("td,dgf->tgf", rows, weights)


def apply_batched(
    weights: ExpertWeights,
    rows: Float[Array, "E C D"],
    gate: Float[Array, "E C 1"] | None = None,
) -> Float[Array, "E C D"]:
    """Each expert over its own rows, weighted by their gates; None means 1.

    In FP8 the gates multiply what the second product reads, as in the dropless dispatchers: tiles
    along the rows depend on it.
    """
    gate = jnp.ones((*rows.shape[:2], 1), rows.dtype) if gate is None else gate
    low = weights.precision == "fp8"
    if low:
        product = functools.partial(first_product, precision="fp8")
        both = jax.vmap(product)(rows, weights.gate_up)
    else:
        both = jnp.einsum("ecd,edgf->ecgf", rows, weights.gate_up)
    if weights.gate_up_bias is not None:
        both += weights.gate_up_bias[:, None]
    hidden = activate(weights.activation, both)
    if low:
        y = jax.vmap(held_matmul)(hidden * gate, weights.down)
        return y if weights.down_bias is None else y + gate * weights.down_bias[:, None]
    y = jnp.einsum("ecf,efd->ecd", hidden, weights.down)
    return (y if weights.down_bias is None else y + weights.down_bias[:, None]) * gate
