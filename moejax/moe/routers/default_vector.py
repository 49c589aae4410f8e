"""Default MoE: the running mean of an expert's outputs stands in where it was not chosen."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import check
from moejax.moe import rowwise
from moejax.moe.routers.base import Card, RouterCounts, RouterInputs, Routing, project
from moejax.moe.routers.losses import LossOptions, ScoredRouter


@dataclasses.dataclass(frozen=True)
class DefaultVectorOptions(LossOptions):
    """Defaults are the paper's for 8 experts.

    Attributes:
      decay: share of the past in the running means; the paper has 0.9 for 8 experts, and for 32
        0.65 (K 1), 0.95 (K 2) and 0.999 (K 4).
    """

    name: str = "default_vector"
    decay: float = 0.9
    balance_loss_weight: float = 0.01

    @property
    def needs_full_width(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 <= self.decay < 1, "router.decay", self.decay,
            "is no share of the past; choose one from 0 to below 1",
        )  # fmt: skip

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        """Scores and stand-ins; not the chosen experts' second forward pass in training."""
        columns = d_model * num_experts
        return RouterCounts(columns, 4.0 * columns, float(top_k))


class DefaultVectorRouter(ScoredRouter):
    """Top-k of p = softmax(W x), gate = p; beside them p_j of the others times their default.

    y = sum over the chosen of p_i E_i(x) + sum over the others of p_j d_j, in evaluation too: so
    dy / dp_j is d_j where expert j did not run, and the router learns of every expert from every
    token. d_j, at first 0, moves after each optimizer step to decay · d_j + (1 - decay) · the mean
    of expert j's outputs in the step, without gates; it stays where no token chose j. No gradient
    flows into d. Causal: d knows earlier batches only.

    In training the chosen experts run a second time, forward only, to have their outputs apart:
    about a third more of the experts' time. Under ``capacity`` a dropped output counts as 0.

    Source: Dense backpropagation for sparse MoE (arXiv 2504.12463). Read in
    summaries and a reimplementation, not in the paper itself. The weight of its balance loss was
    not found; 0.01 is the usual one.
    """

    Options: ClassVar = DefaultVectorOptions
    card: ClassVar = Card(
        "softmax top-k; mean outputs stand in for the experts not chosen", "2504.12463",
        "mean output of each expert", "a router that learns of all experts from every token",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        width = inputs.x.shape[-1]
        x = inputs.x.reshape(-1, width)
        empty = jnp.zeros((self.num_experts, width), jnp.float32)
        default = self.variable("router_state", "default", lambda: empty).value
        logits = self.logits(x)
        p = jax.nn.softmax(logits, axis=-1)
        gate, expert = rowwise.top_k(p, self.top_k)
        chosen = jnp.any(expert[:, :, None] == jnp.arange(self.num_experts)[None, None], axis=1)
        others = jnp.where(chosen | ~inputs.valid.reshape(-1, 1), 0.0, p)
        bypass = project(others, jax.lax.stop_gradient(default)).reshape(inputs.x.shape)
        stats = {"output_sum": self._output_sums(inputs, expert)} if inputs.train else {}
        return self.decide(inputs, logits, p, expert, gate, bypass=bypass, stats=stats)

    def _output_sums(self, inputs: RouterInputs, expert: Int[Array, "T K"]) -> Float[Array, "E D"]:
        """Each expert's outputs summed over the tokens that chose it."""
        rows = jnp.repeat(jax.lax.stop_gradient(inputs.x), self.top_k, axis=1)
        expert = jnp.where(inputs.valid.reshape(-1, 1), expert, self.num_experts).reshape(-1, 1)
        gate = jnp.ones(expert.shape, jnp.float32)
        outputs = jax.lax.stop_gradient(inputs.experts.run(rows, expert, gate))
        flat = outputs.reshape(-1, outputs.shape[-1]).astype(jnp.float32)
        sums = jnp.zeros((self.num_experts + 1, flat.shape[-1]), jnp.float32)
        return sums.at[expert[:, 0]].add(flat)[:-1]

    def update(self, state: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
        if "output_sum" not in stats:
            return state
        load = stats["load"][..., None]
        mean = stats["output_sum"] / jnp.maximum(load, 1)
        keep = self.options.decay
        moved = keep * state["default"] + (1 - keep) * mean
        return {**state, "default": jnp.where(load > 0, moved, state["default"])}
