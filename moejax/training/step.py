"""One optimizer step and one evaluation step, as pure functions to be jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, UInt32

from moejax.models import ModelConfig, Transformer, update_router_state
from moejax.models.mtp import AheadSums, counted_targets
from moejax.moe.routers import batch_loads
from moejax.training.objective import Batch, CrossEntropy, Objective, loss_of
from moejax.training.optimizers import OptimConfig, optimizer_under
from moejax.training.schedules import Hyper
from moejax.training.state import TrainState

Tree = Any

# Weight of the MTP modules' loss where none is given: DeepSeek-V3's for most of its training.
MTP_WEIGHT = 0.3
DEFAULT_MTP_WEIGHT = optax.constant_schedule(MTP_WEIGHT)


@struct.dataclass
class StepMetrics:
    """What a step measured; fetched one step late.

    Attributes:
      loss: cross-entropy without auxiliary terms, nats per target; of preferences, the mean over
        pairs.
      aux_loss: weighted auxiliary losses, the mean over micro-batches.
      gradient_norm: global norm before clipping.
      learning_rate: what this step used.
      targets: tokens counted in the loss: the sum of their weights.
      assignments: tokens that experts computed, all experts and MoE layers added; what capacity
        dropped is not among them.
      router_stats: sums over the whole batch, by segment and layer.
      router_state: what the routers keep, after the step.
      mtp: of MTP modules; None without any.
      computed: tokens that the model ran over; None where each of them is a target that counts 1.
      told: what else the objective measured, by name.
    """

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]
    assignments: Float[Array, ""]
    router_stats: Tree
    router_state: Tree
    mtp: "MTPMetrics | None" = None
    computed: Float[Array, ""] | None = None
    told: Tree = None

    @property
    def tokens(self) -> Float[Array, ""]:
        """Tokens that the model ran over, which are what is paid for."""
        return self.targets if self.computed is None else self.computed


@struct.dataclass
class MTPMetrics:
    """What a step measured of its MTP modules, each array by module.

    Attributes:
      loss: cross-entropy, nats per target that is counted.
      acceptance: share of the counted targets for which the module's likeliest token is the main
        model's; see ``moejax.models.mtp.AheadSums``.
      weight: of the modules' mean loss in this step.
    """

    loss: Float[Array, " M"]
    acceptance: Float[Array, " M"]
    weight: Float[Array, ""]


@struct.dataclass
class EvalMetrics:
    """What an evaluation batch measured.

    Attributes:
      nll: summed negative log-likelihood, nats.
      targets: tokens counted: the sum of their weights.
      router_stats: sums over the batch, by segment and layer.
    """

    nll: Float[Array, ""]
    targets: Float[Array, ""]
    router_stats: Tree


def make_train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int | UInt32[Array, ""] = 0,
    mtp_weight: optax.Schedule = DEFAULT_MTP_WEIGHT,
    objective: Objective | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The function of one optimizer step, over all micro-batches of a batch.

    Gradients are those of the mean over the targets of the whole batch, by their weights where it
    has some, however they fall into micro-batches; auxiliary losses are averaged over
    micro-batches. Routers' state moves once, by statistics summed over all of them. Routers' noise
    is drawn from the seed, the step and the number of the micro-batch. The loss of MTP modules, the
    mean over modules of the mean over the whole batch's targets, is added with ``mtp_weight`` of
    the step. ``objective`` is cross-entropy where none is given.

    The function takes the state, the batch and, for an objective that looks at a second model, that
    one's variables.
    """
    objective = objective or CrossEntropy(model)
    gradients = _gradients(model, objective, seed, mtp_weight)

    def step(
        state: TrainState, batch: Batch, frozen: Tree = None
    ) -> tuple[TrainState, StepMetrics]:
        targets = objective.divisor(batch)
        run = lambda part, index, before: gradients(state, part, index, before, batch, frozen)
        grads, (loss, aux_loss, router_stats, mtp, told) = _over_parts(run, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(
            state.step + 1,
            optax.apply_updates(state.params, updates),
            opt_state,
            update_router_state(model, state.router_state, router_stats),
        )
        norm, rate = optax.tree.norm(grads), jnp.asarray(schedule(state.step), jnp.float32)
        computed = _assignments(router_stats)
        found = None if mtp is None else _mtp_metrics(mtp, mtp_weight(state.step))
        tokens = None if batch.weights is None else jnp.sum(batch.segment_ids > 0)
        return new, StepMetrics(
            loss, aux_loss, norm, rate, targets, computed, router_stats, new.router_state, found,
            tokens, told,
        )  # fmt: skip

    return step


def _gradients(
    model: ModelConfig, objective: Objective, seed: int | UInt32[Array, ""],
    mtp_weight: optax.Schedule,
) -> Callable[..., tuple[Tree, Tree]]:  # fmt: skip
    """The function of one micro-batch's gradients, and of what it measured."""

    def gradients(state: TrainState, part: Batch, index: Array, before: Tree, batch: Batch,
                  frozen: Tree):  # fmt: skip
        parts, targets = batch.tokens.shape[0], objective.divisor(batch)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), index)
        fixed = {"router_state": state.router_state, "router_batch": batch_loads(before)}

        def minimised(params):
            found = objective({"params": params, **fixed}, part, key, frozen)
            out = found.out
            loss = found.objective / targets + out.aux_loss / parts
            if out.mtp is not None:
                counted = counted_targets(batch.segment_ids, model.mtp_depth, batch.weights)
                ahead = out.mtp.replace(targets=counted).loss
                loss += mtp_weight(state.step) * ahead
            return loss, found

        grads, found = jax.grad(minimised, has_aux=True)(state.params)
        out, told = found.out, jax.tree.map(lambda total: total / targets, found.told)
        return grads, (out.nll / targets, out.aux_loss / parts, out.router_stats, out.mtp, told)

    return gradients


def make_shared_step(
    model: ModelConfig, optim: OptimConfig, objective: Objective | None = None
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The function of one optimizer step, for runs that differ in their seed, learning rate or
    length only: it takes these as arguments, in place of what ``optim`` says of them, after state
    and batch; a second model's variables come last."""

    def step(
        state: TrainState, batch: Batch, hyper: Hyper, frozen: Tree = None
    ) -> tuple[TrainState, StepMetrics]:
        rate = hyper.learning_rate
        optimizer = optimizer_under(optim, rate)
        make = make_train_step(model, optimizer, rate, hyper.seed, hyper.mtp_weight, objective)
        return make(state, batch, frozen)

    return step


def _over_parts(run: Callable[[Batch, Array | int, Tree], Tree], batch: Batch) -> Tree:
    """The sum of what ``run`` gives for each micro-batch, its number, and the earlier ones' router
    statistics."""
    parts = batch.tokens.shape[0]
    first = jax.tree.map(lambda a: a[0], batch)
    if parts == 1:
        return run(first, 0, {})
    shapes = jax.eval_shape(lambda: run(first, 0, {}))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, item):
        part, index = item
        return jax.tree.map(jnp.add, total, run(part, index, total[1][2])), None

    return jax.lax.scan(add, zeros, (batch, jnp.arange(parts)))[0]


def make_eval_step(model: ModelConfig) -> Callable[[TrainState, Batch], EvalMetrics]:
    """The function of an evaluation batch."""
    transformer = Transformer(model)

    def step(state: TrainState, batch: Batch) -> EvalMetrics:
        part = jax.tree.map(lambda a: a[0], batch).judged
        variables = {"params": state.params, "router_state": state.router_state}
        out = loss_of(transformer, variables, part)
        return EvalMetrics(out.nll, out.targets, out.router_stats)

    return step


def _mtp_metrics(sums: AheadSums, weight: Array | float) -> MTPMetrics:
    targets, weight = sums.divisor, jnp.asarray(weight, jnp.float32)
    return MTPMetrics(sums.nll / targets, sums.accepted / targets, weight)


def _assignments(router_stats: Tree) -> Array:
    layers = [layer for segment in router_stats.values() for layer in segment.values()]
    computed = [jnp.sum(layer["assignments"] - layer["dropped"]) for layer in layers]
    return jnp.asarray(sum(computed), jnp.float32)
