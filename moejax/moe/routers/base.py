"""What every router takes and gives, and the options that all of them share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.config import check
from moejax.moe.experts import ExpertWeights
from moejax.moe.routers.rows import GatheredRows, MixedRows, Rows, ScaledRows, TokenRows
from moejax.moe.routers.stats import routing_stats

__all__ = [
    "Card", "ExpertProbe", "GatheredRows", "MixedRows", "Router", "RouterCounts", "RouterInputs",
    "RouterOptions", "Routing", "Rows", "ScaledRows", "TokenRows", "matrix_init",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RouterCounts:
    """What a router costs a token, for the bill.

    Attributes:
      params: parameters of one router.
      flops_per_token: FLOPs of its matrix products, forward, a multiply-add being two.
      expected_experts: routed experts that a token runs through, on average.
      measured: ``expected_experts`` is an expectation; a run is billed by the experts that its
        tokens really ran through.
    """

    params: int
    flops_per_token: float
    expected_experts: float
    measured: bool = False


@dataclasses.dataclass(frozen=True)
class Card:
    """A router in one line of the README's table.

    Attributes:
      rule: how experts are chosen and weighed.
      paper: its source, as a link's text and arXiv number or address.
      state: what it keeps between steps; empty for nothing.
      use: when to use it.
    """

    rule: str
    paper: str
    state: str = ""
    use: str = ""


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    """Options that every router has; each router's own class adds to them.

    Class attributes:
      leaks: a token's routing in training depends on later tokens; a causal model refuses it
        unless ``moe.allow_leak`` is set.
      leaks_in_evaluation: there is no causal form, so that evaluation leaks as well.
      carries_logits: the router reads the logits of the MoE layer before its own
        (``RouterInputs.previous_logits``).
      needs_gate_rank: the experts' gate projection has to be a product (``moe.gate_rank``).
    """

    leaks: ClassVar[bool] = False
    leaks_in_evaluation: ClassVar[bool] = False
    carries_logits: ClassVar[bool] = False
    needs_gate_rank: ClassVar[bool] = False

    name: str = ""

    @property
    def needs_full_width(self) -> bool:
        """Whether the router shows the experts what it sees itself: no ``moe.latent_dim`` then."""
        return False

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises ConfigError where the options do not fit the number of experts or top-k."""

    def num_choices(self, num_experts: int) -> int:
        """What the router scores: the experts, and where it has them those without matrices."""
        return num_experts

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        """Parameters, FLOPs and experts per token of a router that scores by one matrix."""
        choices = self.num_choices(num_experts)
        return RouterCounts(d_model * choices, 2.0 * d_model * choices, float(top_k))


@dataclasses.dataclass(frozen=True)
class ExpertProbe:
    """A look into the experts, for routers that score by activations or need outputs.

    Attributes:
      weights: all experts, in the compute type.
      low_rank: first factor of each expert's gate projection in float32, where ``moe.gate_rank``
        is set: its product with a token is that expert's first, low-rank activation.
      run: outputs of rows (G, R, D) for experts (G · R, K) and gates (G · R, K), by the layer's own
        dispatcher and exchange.
    """

    weights: ExpertWeights
    low_rank: Float[Array, "E D r"] | None
    run: Callable[[Array, Array, Array], Array]


@struct.dataclass
class RouterInputs:
    """What a router may look at.

    Attributes:
      x: token vectors.
      valid: False for padding, which is neither routed nor counted.
      tokens: token ids.
      positions: position of each token in its document.
      segment_ids: document of each token in its row, 0 for padding; None means one a row.
      previous_logits: logits of the MoE layer before this one, zeros at the first; only for
        routers that carry them.
      layer: number of this MoE layer in the model, from 0.
      experts: a look into the experts.
      train: whether this is a training step: noise and leaking choices are for training only. A
        router that draws noise takes its key from the rng stream ``router``.
    """

    x: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]
    tokens: Int[Array, "B S"] | None = None
    positions: Int[Array, "B S"] | None = None
    segment_ids: Int[Array, "B S"] | None = None
    previous_logits: Float[Array, "B S N"] | None = None
    layer: Int[Array, ""] | None = None
    experts: ExpertProbe | None = struct.field(pytree_node=False, default=None)
    train: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Routing:
    """A router's decision: a list of assignments of static length, K to each row.

    Attributes:
      expert: index of each assignment's expert, a row's all different; E and above for none
        (padding, a row that runs through fewer than K).
      gate: combine weight of each assignment; 0 where there is none.
      aux_loss: the auxiliary losses, weighted and summed.
      stats: measures that are sums over tokens, so that micro-batches and devices can be added.
      rows: what the experts' rows are; the tokens as they stand for most routers.
      bypass: added to the layer's output: what experts without matrices give.
      logits: what the next layer's router sees of this one.
    """

    expert: Int[Array, "R K"]
    gate: Float[Array, "R K"]
    aux_loss: Float[Array, ""]
    stats: dict[str, Array]
    rows: Rows = TokenRows()
    bypass: Float[Array, "B S D"] | None = None
    logits: Float[Array, "B S N"] | None = None


class Router(nn.Module):
    """Base of the routers: a Linen module from RouterInputs to Routing.

    A subclass sets ``Options`` and ``card`` and defines ``__call__``. If it keeps state, it
    declares it in the collection ``router_state``, only reads it there, and overrides ``update``.

    What a router chose is written to the collection ``router_choice``, variable ``expert``
    (B, S, K), where a caller makes that collection mutable; E and above is none. Choices given in
    the collection ``router_replay``, of the same form, take the place of the router's own: gates
    are those of the live scores, losses and statistics as if the router had chosen so. This is how
    the experts of a rollout are kept in an update (R3, arXiv 2510.11370) or those of the old policy
    in all of its updates (GSPO, arXiv 2507.18071, section 4.4). Under ``capacity``, what a choice
    finds no slot for is dropped anew.

    Class attributes:
      replays: it takes given choices, by ``replayed``. A ``__call__`` of a subclass's own says so
        anew.
    """

    Options: ClassVar[type[RouterOptions]] = RouterOptions
    card: ClassVar[Card]
    replays: ClassVar[bool] = False

    options: RouterOptions
    num_experts: int
    top_k: int
    init_std: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "__call__" in vars(cls) and "replays" not in vars(cls):
            cls.replays = False
        super().__init_subclass__(**kwargs)

    def __call__(self, inputs: RouterInputs) -> Routing:
        raise NotImplementedError

    def update(self, state: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
        """The state after an optimizer step, from statistics summed over the whole batch.

        Called outside ``apply``, once a step. Leading axes (stacked layers) are allowed.
        """
        del stats
        return state

    def matrix(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> Float[Array, "..."]:
        """A float32 parameter; ``axes`` are the logical names of its axes."""
        init = nn.with_logical_partitioning(matrix_init(self.init_std), axes)
        return self.param(name, init, shape, jnp.float32)

    def logits(self, x: Float[Array, "T D"], choices: int = 0) -> Float[Array, "T N"]:
        """Scores by one matrix ``kernel`` (D, N), in float32 whatever the compute type.

        Args:
          x: token vectors.
          choices: N; 0 means ``options.num_choices``.
        """
        count = choices or self.options.num_choices(self.num_experts)
        kernel = self.matrix("kernel", (x.shape[-1], count), ("embed", "router_expert"))
        return project(x, kernel)

    def replayed(self, inputs: RouterInputs) -> Int[Array, "T K"] | None:
        """The experts that the collection ``router_replay`` gives; None where it has none.

        Raises:
          ValueError: given choices are not of the shape (B, S, K) of what is routed.
        """
        if not self.has_variable("router_replay", "expert"):
            return None
        given, wanted = self.get_variable("router_replay", "expert"), inputs.valid.shape
        if given.shape[:2] != wanted or given.ndim != 3:
            raise ValueError(f"router_replay has shape {given.shape}; {(*wanted, 'K')} is routed")
        return jnp.minimum(given.reshape(-1, given.shape[-1]), self.num_experts)

    def _keep_choice(self, inputs: RouterInputs, expert: Int[Array, "R K"], rows: Rows) -> None:
        """Writes a decision to ``router_choice`` where that is asked for.

        Raises:
          ConfigError: the router's rows are no tokens, or it was given choices it did not take.
        """
        if self.is_initializing():
            return
        kept, name = self.is_mutable_collection("router_choice"), self.options.name
        check(
            self.replays or not self.has_variable("router_replay", "expert"), "router.name", name,
            "does not choose by scores that could weigh other experts, so its routing cannot be "
            "replayed; use a top-k router such as deepseek_v3",
        )  # fmt: skip
        check(
            not kept or isinstance(rows, TokenRows), "router.name", name,
            "gives its experts rows that are no tokens, so no token has experts to keep; use a "
            "top-k router such as deepseek_v3",
        )  # fmt: skip
        if kept:
            chosen = expert.reshape(*inputs.valid.shape, -1)
            chosen = nn.with_logical_constraint(chosen, ("batch", "length", None))
            self.put_variable("router_choice", "expert", chosen)

    def finish(
        self,
        inputs: RouterInputs,
        logits: Float[Array, "T N"],
        probabilities: Float[Array, "T N"],
        expert: Int[Array, "R K"],
        gate: Float[Array, "R K"],
        losses: Mapping[str, tuple[float, Float[Array, ""]]] | None = None,
        *,
        rows: Rows | None = None,
        bypass: Float[Array, "B S D"] | None = None,
        stats: Mapping[str, Array] | None = None,
        layer_weights: tuple[float, ...] = (),
    ) -> Routing:
        """Takes padding out of a decision and adds the statistics that all routers report.

        Args:
          inputs: what was routed.
          logits: scores of each token.
          probabilities: the same, normalised over the choices.
          expert: chosen experts; E and above for none.
          gate: combine weights.
          losses: weight and value of each auxiliary loss; also reported, as ``loss_NAME`` times
            the valid tokens, so that dividing sums by tokens gives their mean.
          rows: what the experts' rows are, if not the tokens; the router itself keeps padding
            out of rows that are not tokens one by one.
          bypass: added to the layer's output.
          stats: further sums over tokens.
          layer_weights: factor on the losses by MoE layer; empty for 1 everywhere.
        """
        valid, rows = inputs.valid.reshape(-1), rows or TokenRows()
        if isinstance(rows, TokenRows):
            expert = jnp.where(valid[:, None], expert, self.num_experts)
        expert = jnp.minimum(expert, self.num_experts).astype(jnp.int32)
        self._keep_choice(inputs, expert, rows)
        gate = jnp.where(expert < self.num_experts, gate.astype(jnp.float32), 0.0)
        measured = routing_stats(
            valid, expert, gate, jax.lax.stop_gradient(logits),
            jax.lax.stop_gradient(probabilities), self.num_experts,
        )  # fmt: skip
        reached = rows.reached(jnp.any(expert < self.num_experts, axis=-1), inputs.valid.shape)
        measured["unrouted"] = jnp.sum(inputs.valid & ~reached, dtype=jnp.float32)
        aux_loss = jnp.zeros((), jnp.float32)
        for name, (weight, value) in (losses or {}).items():
            if weight:
                aux_loss += weight * value
                measured[f"loss_{name}"] = jax.lax.stop_gradient(value) * measured["tokens"]
        if layer_weights:
            layer = 0 if inputs.layer is None else inputs.layer
            aux_loss *= jnp.asarray(layer_weights, jnp.float32)[layer]
        carried = jnp.where(inputs.valid[..., None], logits.reshape(*inputs.valid.shape, -1), 0.0)
        return Routing(expert, gate, aux_loss, {**measured, **(stats or {})}, rows, bypass, carried)


def project(x: Float[Array, "*rows D"], kernel: Float[Array, "D N"]) -> Float[Array, "*rows N"]:
    """A matrix product in float32, whatever the compute type and the platform's default."""
    return jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


def matrix_init(std: float) -> nn.initializers.Initializer:
    """Initializer of a weight matrix: normal of that deviation, or scaled by fan-in where 0."""
    return nn.initializers.normal(std) if std else nn.initializers.lecun_normal()
