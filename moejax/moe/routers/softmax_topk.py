"""Softmax router with the Switch-style balance loss and the z-loss (OLMoE, Mixtral, Qwen)."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config import check, check_not_negative
from moejax.moe import balance
from moejax.moe.routers.base import Router, RouterInputs, RouterOptions, Routing


@dataclasses.dataclass(frozen=True)
class SoftmaxTopKOptions(RouterOptions):
    """Options of the softmax router; defaults are OLMoE's.

    Attributes:
      normalize_gates: divide the chosen probabilities by their sum (Mixtral, Qwen3), which is the
        same as a softmax over the chosen logits.
      balance_loss_weight: weight of the Switch-style loss over the whole batch.
      z_loss_weight: weight of the mean squared log-sum-exp.
    """

    name: str = "softmax_topk"
    normalize_gates: bool = False
    balance_loss_weight: float = 0.01
    z_loss_weight: float = 1e-3

    def __post_init__(self) -> None:
        check_not_negative("router", self, "balance_loss_weight", "z_loss_weight")

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            not (self.normalize_gates and top_k == 1), "router.normalize_gates", True,
            "with moe.top_k = 1 makes every gate 1, so the router gets no gradient; "
            "set it to False or raise moe.top_k",
        )  # fmt: skip


class SoftmaxTopKRouter(Router):
    """Top-k of p = softmax(W x); gate = p of the chosen, renormalised or not. Causal, stateless.

    Sources: OLMoE (arXiv 2409.02060, eq. 2 and section 2), Mixtral (arXiv 2401.04088, section
    2.1), Switch Transformers (arXiv 2101.03961, eq. 4), ST-MoE (arXiv 2202.08906, eq. 5).
    """

    Options: ClassVar[type[RouterOptions]] = SoftmaxTopKOptions

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        options: SoftmaxTopKOptions = self.options
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        probabilities = jax.nn.softmax(logits, axis=-1)
        gate, expert = jax.lax.top_k(probabilities, self.top_k)
        if options.normalize_gates:
            gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
        valid = inputs.valid.reshape(-1)
        balance_loss = balance.switch_balance_loss(
            balance.load_fractions(expert, valid, self.num_experts),
            balance.mean_probabilities(probabilities, valid),
        )
        aux_loss = options.balance_loss_weight * balance_loss
        aux_loss += options.z_loss_weight * balance.z_loss(logits, valid)
        return self.finish(inputs, logits, probabilities, expert, gate, aux_loss)
