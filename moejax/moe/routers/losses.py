"""The auxiliary losses that routers with scores share: their weights, and their weighted sum."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import check, check_not_negative
from moejax.moe import balance
from moejax.moe.coupling import coupling_loss
from moejax.moe.routers.base import Router, RouterInputs, RouterOptions, Routing
from moejax.moe.routers.rows import Rows
from moejax.moe.routers.stats import assignment_counts

Losses = dict[str, tuple[float, Float[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class LossOptions(RouterOptions):
    """Weights of the auxiliary losses; 0 leaves a loss out. Formulas: ``moejax.moe.balance``.

    Attributes:
      balance_loss_weight: the Switch-style loss over all tokens of a micro-batch, 1 at balance.
      sequence_loss_weight: the same of each row of the batch by itself.
      global_loss_weight: the same with the load of all micro-batches of the step so far (those of
        all devices are in one micro-batch already); the last one thus sees the whole batch's.
      importance_loss_weight: squared variation of the experts' summed gates, 0 at balance.
      z_loss_weight: mean squared log-sum-exp of the logits.
      orthogonal_loss_weight: squared cosines between the router's columns (ERNIE 4.5: 0.01).
      similarity_loss_weight: distance of the router's Gram matrix from 1 (SimBal: 0.1).
      coupling_loss_weight: how far an expert answers another's router column louder than its own
        expert does, or its own less than another's (expert-router coupling: 1); noisy in training.
      coupling_alpha: its margin, from 0, which wants experts the most different, to 1.
      layer_weights: factor on the sum by MoE layer, first to last; empty for 1 everywhere. Routers
        of MTP modules have the last one's.
    """

    balance_loss_weight: float = 0.0
    sequence_loss_weight: float = 0.0
    global_loss_weight: float = 0.0
    importance_loss_weight: float = 0.0
    z_loss_weight: float = 0.0
    orthogonal_loss_weight: float = 0.0
    similarity_loss_weight: float = 0.0
    coupling_loss_weight: float = 0.0
    coupling_alpha: float = 1.0
    layer_weights: tuple[float, ...] = ()

    @property
    def needs_full_width(self) -> bool:
        return self.coupling_loss_weight > 0

    def __post_init__(self) -> None:
        weights = [f.name for f in dataclasses.fields(self) if f.name.endswith("_loss_weight")]
        check_not_negative("router", self, *weights)
        check(
            all(weight >= 0 for weight in self.layer_weights), "router.layer_weights",
            self.layer_weights, "has a weight below zero; choose weights from 0 up",
        )  # fmt: skip


class ScoredRouter(Router):
    """Base of the routers that score the experts and can be given the losses of ``LossOptions``."""

    def losses(
        self,
        inputs: RouterInputs,
        logits: Float[Array, "T N"],
        probabilities: Float[Array, "T N"],
        expert: Int[Array, "R K"],
        gate: Float[Array, "R K"],
    ) -> Losses:
        """Weight and value of each loss whose weight is not 0; see ``LossOptions``.

        Args:
          inputs: what was routed.
          logits: scores of each token.
          probabilities: the same, normalised over the choices.
          expert: chosen of these choices, token by token unless only the batch's load is needed.
          gate: combine weights.
        """
        o: LossOptions = self.options
        valid, choices = inputs.valid.reshape(-1), probabilities.shape[-1]
        load = assignment_counts(self._masked(expert, valid, choices), choices)
        share = lambda load: load / jnp.maximum(jnp.sum(load), 1)
        mean = balance.mean_probabilities(probabilities, valid)
        found: Losses = {}
        if o.balance_loss_weight:
            value = balance.switch_balance_loss(share(load), mean)
            found["balance"] = (o.balance_loss_weight, value)
        if o.sequence_loss_weight:
            rows = lambda values: values.reshape(*inputs.valid.shape, -1)
            value = balance.sequence_balance_loss(rows(expert), rows(probabilities), inputs.valid)
            found["sequence"] = (o.sequence_loss_weight, value)
        if o.global_loss_weight:
            if self.has_variable("router_batch", "load"):
                load = load + self.get_variable("router_batch", "load")
            value = balance.switch_balance_loss(share(load), mean)
            found["global"] = (o.global_loss_weight, value)
        if o.importance_loss_weight:
            expert = self._masked(expert, valid, choices)
            gate = jnp.where(expert < choices, gate, 0.0)
            value = balance.importance_loss(expert, gate, choices)
            found["importance"] = (o.importance_loss_weight, value)
        if o.z_loss_weight:
            found["z"] = (o.z_loss_weight, balance.z_loss(logits, valid))
        if o.orthogonal_loss_weight or o.similarity_loss_weight:
            kernel = nn.meta.unbox(self.get_variable("params", "kernel"))
            found["orthogonal"] = (o.orthogonal_loss_weight, balance.orthogonal_loss(kernel))
            found["similarity"] = (o.similarity_loss_weight, balance.similarity_loss(kernel))
        if o.coupling_loss_weight:
            found["coupling"] = (o.coupling_loss_weight, self._coupling(inputs))
        return found

    def _coupling(self, inputs: RouterInputs) -> Float[Array, ""]:
        """The experts' answers to the router's columns; see ``moejax.moe.coupling``.

        Experts' biases, the same whatever is asked, are no part of them.
        """
        kernel = nn.meta.unbox(self.get_variable("params", "kernel"))
        gate = inputs.experts.weights.gate_up[:, :, 0]
        noise = self.make_rng("router") if inputs.train else None
        kernel = kernel[:, : self.num_experts]
        return coupling_loss(kernel, gate, self.options.coupling_alpha, noise)

    def _masked(self, expert, valid, choices):
        """Padding tokens' choices taken out, where rows are tokens."""
        return jnp.where(valid[:, None], expert, choices) if len(expert) == len(valid) else expert

    def decide(
        self,
        inputs: RouterInputs,
        logits: Float[Array, "T N"],
        probabilities: Float[Array, "T N"],
        expert: Int[Array, "R K"],
        gate: Float[Array, "R K"],
        losses: Losses | None = None,
        *,
        rows: Rows | None = None,
        bypass: Float[Array, "B S D"] | None = None,
        stats: dict[str, Array] | None = None,
        loss_expert: Int[Array, "R K"] | None = None,
        loss_gate: Float[Array, "R K"] | None = None,
    ) -> Routing:
        """``finish`` with the shared losses added.

        Args:
          inputs, logits, probabilities, expert, gate, rows, bypass, stats: as for ``finish``.
          losses: weight and value of the router's own losses.
          loss_expert: choices that the losses see, where they are more than the experts.
          loss_gate: their gates.
        """
        seen = expert if loss_expert is None else loss_expert
        weights = gate if loss_gate is None else loss_gate
        shared = self.losses(inputs, logits, probabilities, seen, weights)
        return self.finish(
            inputs, logits, probabilities, expert, gate, {**shared, **(losses or {})}, rows=rows,
            bypass=bypass, stats=stats, layer_weights=self.options.layer_weights,
        )  # fmt: skip


def check_no_kernel_losses(options: LossOptions) -> None:
    """Refuses the losses of the matrix ``kernel``, for routers that have none."""
    for name in ("orthogonal_loss_weight", "similarity_loss_weight", "coupling_loss_weight"):
        value = getattr(options, name)
        check(
            not value, f"router.{name}", value,
            f"needs one matrix column an expert, which router {options.name} lacks; set it to 0",
        )  # fmt: skip


def batch_loads(router_stats: dict, names: Sequence[str] = ("moe", "router")) -> dict:
    """The collection ``router_batch`` of a step's next micro-batch: the load of those before it.

    Args:
      router_stats: sums over the earlier micro-batches, by segment and layer.
      names: where a layer keeps its router.
    """
    # Of all choices, where a router has some without matrices.
    load = lambda stats: stats.get("choice_load", stats["load"])
    place = lambda stats: {names[0]: {names[1]: {"load": load(stats)}}}
    return {
        segment: {layer: place(stats) for layer, stats in layers.items()}
        for segment, layers in router_stats.items()
    }
