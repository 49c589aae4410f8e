"""The MoE layer: router -> dispatch -> experts -> combine, plus shared experts."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.moe.choose import choose_here
from moejax.moe.dispatch import dispatch, drop, expert_capacity
from moejax.moe.exchange import exchange, rows_in_reach
from moejax.moe.exchange.traffic import layer_traffic
from moejax.moe.experts import Experts, SwiGLU
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers import REGISTRY, Router, RouterInputs, Routing


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
          those of ``Routing.stats``; ``dropped``, the assignments that found no slot; and the
          exchange's, see ``moejax.moe.exchange.traffic.layer_traffic``.

        Raises:
          ConfigError: a back end that the config names cannot run on this platform.
        """
        config = self.config
        choice = choose_here(config)
        router = self.make_router(config, self.init_std, name="router")
        routing = router(RouterInputs(x, valid))
        # First, and fed by nothing that is exchanged: XLA may compute them while rows travel.
        shared = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.d_expert
            shared = SwiGLU(width, self.init_std, name="shared")(x)
        experts = Experts(config.num_experts, config.d_expert, self.init_std, name="experts")
        weights = experts(x.shape[-1], x.dtype)
        expert, slots, dropped = self._drop(choice.dispatch, routing, x.shape[1])
        # Slots are a sequence's; a device may have to hold those of several.
        reach = rows_in_reach(choice.exchange, x.shape[0])
        y, beyond = exchange(
            choice.exchange,
            functools.partial(dispatch, choice.dispatch, slots=slots * reach),
            x,
            expert,
            routing.gate,
            weights,
            factor=config.exchange_factor,
            exact=config.exchange_overflow == "exact",
        )
        sent = layer_traffic(config, choice.exchange, x, expert, beyond)
        y = y if shared is None else y + shared
        return y, routing.aux_loss, {**routing.stats, "dropped": dropped, **sent}

    def _drop(
        self, name: str, routing: Routing, group: int
    ) -> tuple[Int[Array, "T K"], int, Float[Array, ""]]:
        """The choices that capacity leaves, slots of an expert in a sequence, and the drops."""
        config = self.config
        if name != "capacity":
            return routing.expert, 0, jnp.zeros((), jnp.float32)
        slots = expert_capacity(group, config.top_k, config.num_experts, config.capacity_factor)
        expert, dropped = drop(
            routing.expert, routing.gate, num_experts=config.num_experts, group=group,
            slots=slots, policy=config.drop_policy,
        )  # fmt: skip
        return expert, slots, dropped
