"""Routers that add Gaussian noise to the logits and balance the load that it makes smooth."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import check, check_not_negative, check_positive
from moejax.moe import balance, rowwise
from moejax.moe.routers.base import Card, RouterCounts, RouterInputs, Routing, project
from moejax.moe.routers.losses import Losses, LossOptions, ScoredRouter
from moejax.moe.routers.top_k import gates


@dataclasses.dataclass(frozen=True)
class NoisyTopKOptions(LossOptions):
    """Defaults are those of Shazeer's language models and of the code they were published with.

    Attributes:
      load_loss_weight: squared variation of the experts' expected assignments, 0 at balance.
      noise_floor: added to the noise's deviation (in the code, not in the paper's eq. 4).
    """

    name: str = "noisy_top_k"
    importance_loss_weight: float = 0.1
    load_loss_weight: float = 0.1
    noise_floor: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("router", self, "noise_floor")

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            top_k > 1, "moe.top_k", top_k,
            "makes every gate of router noisy_top_k 1, so the router learns nothing from the loss; "
            "choose 2 or more, or router.name = 'vmoe'",
        )  # fmt: skip

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        one = super().counts(d_model, num_experts, top_k)
        return dataclasses.replace(
            one, params=2 * one.params, flops_per_token=2 * one.flops_per_token
        )


class NoisyTopKRouter(ScoredRouter):
    """Softmax over the K largest of W x + eps · softplus(W_noise x), eps standard normal.

    The load of an expert is the sum over tokens of its probability to be chosen, were its own noise
    drawn again: Phi((its logit - threshold) / deviation), where the threshold is the K-th largest
    of the others' noisy logits. In evaluation there is no noise, W_noise is not multiplied, and the
    load is the count of assignments, to which the deviation's limit 0 leads: without gradient.

    Source: Shazeer et al. (arXiv 1701.06538, eq. 3 to 11 and appendix A) and the code in
    Tensor2Tensor. W_noise starts at zero as there; W, which does too, starts as other routers' do
    here. Losses are over all tokens of a micro-batch. Causal.
    """

    Options: ClassVar[type[NoisyTopKOptions]] = NoisyTopKOptions
    card: ClassVar[Card] = Card(
        "noise of learned deviation on the logits, top-k, softmax over the chosen",
        "Shazeer, 1701.06538", "", "exploration whose size is learned by token",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: NoisyTopKOptions = self.options
        x, valid = inputs.x.reshape(-1, inputs.x.shape[-1]), inputs.valid.reshape(-1)
        clean = self.logits(x)
        init = nn.with_logical_partitioning(
            nn.initializers.zeros_init(), ("embed", "router_expert")
        )
        w_noise = self.param("noise_kernel", init, (x.shape[-1], self.num_experts), jnp.float32)
        noisy, deviation = clean, None
        if inputs.train:
            deviation = jax.nn.softplus(project(x, w_noise)) + o.noise_floor
            noisy = clean + deviation * jax.random.normal(self.make_rng("router"), clean.shape)
        expert = rowwise.top_k(jax.lax.stop_gradient(noisy), self.top_k)[1]
        gate = jax.nn.softmax(gates(noisy, expert, False), axis=-1)
        chosen = chosen_mask(expert, self.num_experts)
        # All chosen whatever the noise: no threshold among the others, and the load is even.
        smooth = deviation is not None and self.top_k < self.num_experts
        likely = chosen_again(clean, noisy, deviation, chosen) if smooth else chosen
        load = balance.squared_variation(jnp.sum(likely * valid[:, None], axis=0))
        return self.decide(
            inputs, clean, jax.nn.softmax(clean, axis=-1), expert, gate,
            {"load": (o.load_loss_weight, load)},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VMoEOptions(LossOptions):
    """Defaults are V-MoE's.

    Attributes:
      importance_loss_weight: here, squared variation of the summed softmax, before the choice.
      load_loss_weight: squared variation of the experts' expected assignments, 0 at balance; of
        training with noise only.
      noise_std: the noise's deviation times the number of experts.
    """

    name: str = "vmoe"
    importance_loss_weight: float = 0.005
    load_loss_weight: float = 0.005
    noise_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("router", self, "noise_std")


class VMoERouter(ScoredRouter):
    """Top-k of softmax(W x + eps · noise_std / E), gates as they are, eps standard normal.

    The probability behind the load is 1 - Phi((threshold - its logit) / deviation) with the K-th
    largest noisy logit as the threshold for all experts. In evaluation there is no noise and the
    load loss is left out, as in the code: it is defined for a random choice only.

    Source: V-MoE (arXiv 2106.05974, section 2 and appendix A) and its released code, whose configs
    give both losses the weight 0.005. The code takes them by group of images; here they are over
    all tokens of a micro-batch. Causal.
    """

    Options: ClassVar[type[VMoEOptions]] = VMoEOptions
    card: ClassVar[Card] = Card(
        "softmax of logits with noise of deviation 1/E, then top-k", "V-MoE, 2106.05974", "",
        "balance by a differentiable load; top-1 too",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: VMoEOptions = self.options
        clean = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        noisy, losses = clean, {}
        deviation = o.noise_std / self.num_experts
        if inputs.train and deviation:
            noisy = clean + deviation * jax.random.normal(self.make_rng("router"), clean.shape)
        expert = rowwise.top_k(jax.lax.stop_gradient(noisy), self.top_k)[1]
        gate = gates(jax.nn.softmax(noisy, axis=-1), expert, False)
        if inputs.train and deviation:
            chosen = chosen_mask(expert, self.num_experts)
            threshold = jnp.min(jnp.where(chosen, noisy, jnp.inf), axis=-1, keepdims=True)
            likely = jax.scipy.stats.norm.cdf((clean - threshold) / deviation)
            load = jnp.sum(likely * inputs.valid.reshape(-1, 1), axis=0)
            losses["load"] = (o.load_loss_weight, balance.squared_variation(load))
        return self.decide(inputs, clean, jax.nn.softmax(clean, axis=-1), expert, gate, losses)

    def losses(
        self,
        inputs: RouterInputs,
        logits: Float[Array, "T N"],
        probabilities: Float[Array, "T N"],
        expert: Int[Array, "R K"],
        gate: Float[Array, "R K"],
    ) -> Losses:
        """The shared losses, with the importance of all experts instead of the chosen."""
        found = super().losses(inputs, logits, probabilities, expert, gate)
        if "importance" in found:
            mean = balance.mean_probabilities(probabilities, inputs.valid.reshape(-1))
            weight = self.options.importance_loss_weight
            found["importance"] = (weight, balance.squared_variation(mean))
        return found


def chosen_mask(expert: Int[Array, "T K"], num_experts: int) -> Bool[Array, "T E"]:
    """Which experts each token chose."""
    return jnp.any(jax.nn.one_hot(expert, num_experts, dtype=bool), axis=-2)


def chosen_again(
    clean: Float[Array, "T E"],
    noisy: Float[Array, "T E"],
    deviation: Float[Array, "T E"],
    chosen: Bool[Array, "T E"],
) -> Float[Array, "T E"]:
    """Each expert's probability to be among the K largest, were its own noise drawn again.

    Source: arXiv 1701.06538, eq. 8 and 9. The K-th largest of the others is the best that was not
    chosen for those that were, and the worst that was chosen for those that were not.

    Args:
      clean: logits without noise.
      noisy: with it.
      deviation: of the noise.
      chosen: the K largest of ``noisy``, K < E.
    """
    best_out = jnp.max(jnp.where(chosen, -jnp.inf, noisy), axis=-1, keepdims=True)
    worst_in = jnp.min(jnp.where(chosen, noisy, jnp.inf), axis=-1, keepdims=True)
    threshold = jnp.where(chosen, best_out, worst_in)
    return jax.scipy.stats.norm.cdf((clean - threshold) / deviation)
