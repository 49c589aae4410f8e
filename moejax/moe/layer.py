"""The MoE layer: router -> dispatch -> experts -> combine, plus shared experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.moe.choose import Choice, choose_here
from moejax.moe.dispatch import dispatch, drop, expert_capacity
from moejax.moe.exchange import exchange, slots_in_reach
from moejax.moe.exchange.traffic import layer_traffic
from moejax.moe.experts import Experts, ExpertWeights, SwiGLU, held_experts
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers import ExpertProbe, Router, RouterInputs, find
from moejax.moe.routers.base import matrix_init
from moejax.numerics import Precision


@struct.dataclass
class MoEOutput:
    """What an MoE layer gives.

    Attributes:
      y: the outputs.
      aux_loss: the weighted auxiliary losses.
      stats: sums over tokens: those of ``Routing.stats``; ``dropped``, the assignments that found
        no slot; and the exchange's, see ``moejax.moe.exchange.traffic.layer_traffic``.
      logits: the router's scores, for routers of later layers that want them.
    """

    y: Float[Array, "B S D"]
    aux_loss: Float[Array, ""]
    stats: dict[str, Array]
    logits: Float[Array, "B S N"] | None


class MoELayer(nn.Module):
    """Routed experts, and shared ones that every token runs through (arXiv 2401.06066, eq. 9).

    With ``latent_dim`` the routed experts work in a narrower space, between two matrices that they
    share; router and shared experts keep the full width (latent MoE, arXiv 2601.18089).

    Attributes:
      config: options of the layer and of its router.
      init_std: deviation of the initial weights; 0 scales by fan-in.
      precision: of the experts' products, routed and shared. The router, the maps into and out of
        a latent space and the shared experts' gate are ``native`` always, and so is what a router
        reads of the experts' weights.
    """

    config: MoEConfig
    init_std: float = 0.0
    precision: Precision = "native"

    @staticmethod
    def make_router(config: MoEConfig, init_std: float = 0.0, **module_args) -> Router:
        """The router that a config names, unbound or as a submodule."""
        router = find(config.router.name)
        return router(config.router, config.num_experts, config.top_k, init_std, **module_args)

    @staticmethod
    def make_experts(config: MoEConfig, init_std: float = 0.0, **module_args) -> Experts:
        """The routed experts of a config, unbound or as a submodule."""
        return Experts(
            config.num_experts, config.d_expert, init_std, config.gate_rank, config.expert_bias,
            config.activation, **module_args,
        )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> MoEOutput:
        """Routes and computes.

        Args:
          inputs: the normalised layer input ``x``, which tokens are ``valid``, and what else the
            router looks at; the layer adds the look into its experts.

        Raises:
          ConfigError: a back end that the config names cannot run on this platform.
        """
        config, x = self.config, inputs.x
        choice = choose_here(config)
        width = config.latent_dim or x.shape[-1]
        experts = self.make_experts(config, self.init_std, name="experts")
        low = self.precision == "fp8"
        weights, low_rank = experts(width, jnp.dtype("float32") if low else x.dtype)
        # Held before they are cut over devices, so that blocks are the same on any mesh.
        held = held_experts(weights) if low else weights
        run = lambda rows, expert, gate: _compute(config, choice, rows, expert, gate, held)[0]
        probe = ExpertProbe(weights, low_rank, run)
        router = self.make_router(config, self.init_std, name="router")
        routing = router(inputs.replace(experts=probe))
        # Early, and fed by nothing that is exchanged: XLA may compute them while rows travel.
        shared = self._shared(x)
        rows = routing.rows.enter(self._latent("latent_in", x, width))
        y, stats = _compute(config, choice, rows, routing.expert, routing.gate, held)
        y = self._latent("latent_out", routing.rows.leave(y, x[..., :width]), x.shape[-1])
        for more in (shared, routing.bypass):
            y = y if more is None else y + more.astype(y.dtype)
        return MoEOutput(y, routing.aux_loss, {**routing.stats, **stats}, routing.logits)

    def _latent(self, name: str, x: Float[Array, "B S D"], width: int) -> Float[Array, "B S d"]:
        """Between the model's width and the experts', where they differ."""
        if not self.config.latent_dim:
            return x
        axes = ("embed", None) if name == "latent_in" else (None, "embed")
        init = nn.with_logical_partitioning(matrix_init(self.init_std), axes)
        kernel = self.param(name, init, (x.shape[-1], width), jnp.float32)
        return jnp.matmul(x, kernel.astype(x.dtype))

    def _shared(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"] | None:
        """The shared experts' output, with a gate of its own if there is one (Qwen2-MoE)."""
        config = self.config
        if not config.num_shared_experts:
            return None
        width = config.num_shared_experts * config.d_expert
        y = SwiGLU(width, self.init_std, self.precision, name="shared")(x)
        if not config.shared_gate:
            return y
        init = nn.with_logical_partitioning(matrix_init(self.init_std), ("embed", None))
        kernel = self.param("shared_gate", init, (x.shape[-1], 1), jnp.float32)
        return jax.nn.sigmoid(jnp.matmul(x, kernel.astype(x.dtype))) * y


def _compute(
    config: MoEConfig,
    choice: Choice,
    rows: Float[Array, "G R D"],
    expert: Int[Array, "R K"],
    gate: Float[Array, "R K"],
    weights: ExpertWeights,
) -> tuple[Float[Array, "G R D"], dict[str, Array]]:
    """The rows' combined outputs over the mesh, and what was dropped and sent."""
    choices = min(config.top_k, expert.shape[1])
    slots = expert_capacity(rows.shape[1], choices, config.num_experts, config.capacity_factor)
    dropped = jnp.zeros((), jnp.float32)
    if choice.dispatch == "capacity":
        expert, dropped = drop(
            expert, gate, num_experts=config.num_experts, group=rows.shape[1], slots=slots,
            policy=config.drop_policy,
        )  # fmt: skip
    # What FP8 holds needs more bits than bfloat16's, scales included.
    inputs = rows.astype(jnp.float32) if weights.precision == "fp8" else rows
    # Slots are a group's; a device may have to hold those of several.
    slots = slots_in_reach(choice.exchange, *rows.shape[:2], slots)
    y, beyond = exchange(
        choice.exchange, functools.partial(dispatch, choice.dispatch, slots=slots), inputs,
        expert, gate, weights, factor=config.exchange_factor,
        exact=config.exchange_overflow == "exact",
    )  # fmt: skip
    sent = layer_traffic(config, choice.exchange, rows, expert, beyond)
    return y.astype(rows.dtype), {"dropped": dropped, **sent}
