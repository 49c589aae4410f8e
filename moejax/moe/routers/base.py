"""What every router takes and gives, and the options that all of them share."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class RouterCounts:
    """What a router costs a token, for the bill.

    Attributes:
      params: parameters of one router.
      flops_per_token: FLOPs of its matrix products, forward, a multiply-add being two.
      expected_experts: routed experts that a token runs through, on average.
    """

    params: int
    flops_per_token: float
    expected_experts: float


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    """Options that every router has; each router's own class adds to them."""

    name: str = ""

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises ConfigError where the options do not fit the number of experts or top-k."""

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        """Parameters, FLOPs and experts per token of a router that scores by one matrix."""
        return RouterCounts(d_model * num_experts, 2.0 * d_model * num_experts, float(top_k))


@struct.dataclass
class RouterInputs:
    """What a router may look at.

    Attributes:
      x: token vectors.
      valid: False for padding, which is neither routed nor counted.
    """

    x: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]


@struct.dataclass
class Routing:
    """A router's decision.

    Attributes:
      expert: index of each assignment's expert; E where the token is padding.
      gate: combine weight of each assignment; 0 where the token is padding.
      aux_loss: the auxiliary losses, weighted and summed.
      stats: measures that are sums over tokens, so that micro-batches and devices can be added.
    """

    expert: Int[Array, "T K"]
    gate: Float[Array, "T K"]
    aux_loss: Float[Array, ""]
    stats: dict[str, Array]


class Router(nn.Module):
    """Base of the routers: a Linen module from RouterInputs to Routing.

    A subclass sets ``Options`` and defines ``__call__``. If it keeps state, it declares it in the
    collection ``router_state``, only reads it there, and overrides ``update``.
    """

    Options: ClassVar[type[RouterOptions]] = RouterOptions

    options: RouterOptions
    num_experts: int
    top_k: int
    init_std: float = 0.0

    def __call__(self, inputs: RouterInputs) -> Routing:
        raise NotImplementedError

    def update(self, state: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
        """The state after an optimizer step, from statistics summed over the whole batch.

        Called outside ``apply``, once a step. Leading axes (stacked layers) are allowed.
        """
        del stats
        return state

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """Scores by one matrix, in float32 whatever the compute type."""
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(matrix_init(self.init_std), ("embed", "router_expert")),
            (x.shape[-1], self.num_experts),
            jnp.float32,
        )
        return jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)

    def finish(
        self,
        inputs: RouterInputs,
        logits: Float[Array, "T E"],
        probabilities: Float[Array, "T E"],
        expert: Int[Array, "T K"],
        gate: Float[Array, "T K"],
        aux_loss: Float[Array, ""],
    ) -> Routing:
        """Takes padding out of a decision and adds the statistics that all routers report."""
        valid = inputs.valid.reshape(-1, 1)
        expert = jnp.where(valid, expert, self.num_experts).astype(jnp.int32)
        gate = jnp.where(valid, gate, 0.0)
        stats = routing_stats(
            valid[:, 0], expert, gate, jax.lax.stop_gradient(logits),
            jax.lax.stop_gradient(probabilities),
        )  # fmt: skip
        return Routing(expert, gate, aux_loss, stats)


def matrix_init(std: float) -> nn.initializers.Initializer:
    """Initializer of a weight matrix: normal of that deviation, or scaled by fan-in where 0."""
    return nn.initializers.normal(std) if std else nn.initializers.lecun_normal()


def routing_stats(
    valid: Bool[Array, " T"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    logits: Float[Array, "T E"],
    probabilities: Float[Array, "T E"],
) -> dict[str, Array]:
    """Sums over valid tokens from which ``moejax.moe.diagnostics`` computes a router's health.

    Returns:
      ``load`` (E,) assignments of each expert, ``gate_mass`` (E,) their summed gates, and the
      scalars ``tokens``, ``assignments``, ``entropy`` (of the normalised scores, nats),
      ``squared_logsumexp`` and ``top1_margin``.
    """
    num_experts = logits.shape[-1]
    gate = jax.lax.stop_gradient(gate)
    load = assignment_counts(expert, num_experts)
    mass = jnp.zeros(num_experts + 1).at[expert.reshape(-1)].add(gate.reshape(-1))[:num_experts]
    weight = valid.astype(jnp.float32)
    entropy = -jnp.sum(probabilities * jnp.log(probabilities + 1e-20), axis=-1)
    # Not by top_k: slicing its result makes XLA on CPUs sort every row, at twenty times the cost.
    best = jnp.argmax(probabilities, axis=-1)
    is_best = jnp.arange(num_experts)[None, :] == best[:, None]
    second = jnp.max(jnp.where(is_best, 0.0, probabilities), axis=-1)
    return {
        "load": load,
        "gate_mass": mass,
        "tokens": jnp.sum(weight),
        "assignments": jnp.sum(load),
        "entropy": jnp.sum(weight * entropy),
        "squared_logsumexp": jnp.sum(weight * jax.nn.logsumexp(logits, axis=-1) ** 2),
        "top1_margin": jnp.sum(weight * (jnp.max(probabilities, axis=-1) - second)),
    }


def assignment_counts(expert: Int[Array, "*shape"], num_experts: int) -> Float[Array, " E"]:
    """Assignments of each expert; indices of E and above (padding) are not counted."""
    return jnp.bincount(expert.reshape(-1), length=num_experts + 1)[:num_experts].astype(
        jnp.float32
    )
