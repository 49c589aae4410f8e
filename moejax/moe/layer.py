"""The MoE layer: router -> dispatch -> experts -> combine, plus shared experts."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.moe.dispatch import dispatch, drop, expert_capacity
from moejax.moe.exchange import exchange
from moejax.moe.experts import Experts, SwiGLU
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers import REGISTRY, Router, RouterInputs


class MoELayer(nn.Module):
    """Routed experts, and shared ones that every token runs through (arXiv 2401.06066, eq. 9).

    Attributes:
      config: options of the layer and of its router.
      init_std: deviation of the initial weights; 0 scales by fan-in.
    """

    config: MoEConfig
    init_std: float = 0.0

    @staticmethod
    def make_router(config: MoEConfig, init_std: float = 0.0, **module_args) -> Router:
        """The router that a config names, unbound or as a submodule."""
        router = REGISTRY[config.router.name]
        return router(config.router, config.num_experts, config.top_k, init_std, **module_args)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, ""], dict[str, Array]]:
        """Routes and computes.

        Args:
          x: normalised layer input.
          valid: False for padding, which no routed expert sees.

        Returns:
          The outputs, the weighted auxiliary loss, and statistics that are sums over tokens:
          those of ``Routing.stats`` and ``dropped``, the assignments that found no slot.
        """
        config = self.config
        router = self.make_router(config, self.init_std, name="router")
        routing = router(RouterInputs(x, valid))
        experts = Experts(config.num_experts, config.d_expert, self.init_std, name="experts")
        weights = experts(x.shape[-1], x.dtype)
        expert, name, slots = routing.expert, config.chosen_dispatch, 0
        dropped = jnp.zeros((), jnp.float32)
        if name == "capacity":
            slots = expert_capacity(x.shape[1], config.top_k, config.num_experts, config.capacity_factor)
            expert, dropped = drop(
                expert, routing.gate, num_experts=config.num_experts, group=x.shape[1], slots=slots
            )
        local = functools.partial(dispatch, name, slots=slots * x.shape[0])
        y = exchange(local, x, expert, routing.gate, weights)
        if config.num_shared_experts:
            width = config.num_shared_experts * config.d_expert
            y += SwiGLU(width, self.init_std, name="shared")(x)
        return y, routing.aux_loss, {**routing.stats, "dropped": dropped}
