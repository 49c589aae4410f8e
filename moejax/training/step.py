"""One optimizer step and one evaluation step, as pure functions to be jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.models import LossOutput, ModelConfig, Transformer, update_router_state
from moejax.parallel import axis_rules
from moejax.training.state import TrainState

Tree = Any


@struct.dataclass
class Batch:
    """Packed rows, one leading axis of micro-batches.

    Attributes:
      tokens: inputs.
      targets: next tokens.
      segment_ids: document of each token in its row; 0 is padding and is not counted.
      positions: position in the document.
    """

    tokens: Int[Array, "A B S"]
    targets: Int[Array, "A B S"]
    segment_ids: Int[Array, "A B S"]
    positions: Int[Array, "A B S"]


@struct.dataclass
class StepMetrics:
    """What a step measured; fetched one step late.

    Attributes:
      loss: cross-entropy without auxiliary terms, nats per target.
      aux_loss: weighted auxiliary losses, the mean over micro-batches.
      gradient_norm: global norm before clipping.
      learning_rate: what this step used.
      targets: tokens counted in the loss.
      router_stats: sums over the whole batch, by segment and layer.
    """

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    targets: Float[Array, ""]
    router_stats: Tree


def make_train_step(
    model: ModelConfig, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The function of one optimizer step, over all micro-batches of a batch.

    Gradients are those of the mean over the targets of the whole batch, however they fall into
    micro-batches; auxiliary losses are averaged over micro-batches. Routers' state moves once,
    by statistics summed over all of them.
    """
    transformer = Transformer(model)

    def gradients(params: Tree, router_state: Tree, part: Batch, targets: Array, parts: int):
        def objective(params):
            out = _loss(transformer, {"params": params, "router_state": router_state}, part)
            return out.nll / targets + out.aux_loss / parts, out

        grads, out = jax.grad(objective, has_aux=True)(params)
        return grads, (out.nll / targets, out.aux_loss / parts, out.router_stats)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        parts = batch.tokens.shape[0]
        targets = jnp.maximum(jnp.sum(batch.segment_ids > 0), 1).astype(jnp.float32)
        run = lambda part: gradients(state.params, state.router_state, part, targets, parts)
        first = jax.tree.map(lambda a: a[0], batch)
        if parts == 1:
            total = run(first)
        else:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run, first))
            add = lambda carry, part: (jax.tree.map(jnp.add, carry, run(part)), None)
            total, _ = jax.lax.scan(add, zeros, batch)
        grads, (loss, aux_loss, router_stats) = total
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(
            state.step + 1,
            optax.apply_updates(state.params, updates),
            opt_state,
            update_router_state(model, state.router_state, router_stats),
        )
        norm, rate = optax.tree.norm(grads), jnp.asarray(schedule(state.step), jnp.float32)
        return new, StepMetrics(loss, aux_loss, norm, rate, targets, router_stats)

    return step


def make_eval_step(
    model: ModelConfig,
) -> Callable[[TrainState, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """The function of an evaluation batch: summed negative log-likelihood and targets counted."""
    transformer = Transformer(model)

    def step(state: TrainState, batch: Batch) -> tuple[Array, Array]:
        part = jax.tree.map(lambda a: a[0], batch)
        variables = {"params": state.params, "router_state": state.router_state}
        out = _loss(transformer, variables, part)
        return out.nll, out.targets

    return step


def _loss(transformer: Transformer, variables: Tree, part: Batch) -> LossOutput:
    with axis_rules():
        return transformer.apply(
            variables, part.tokens, part.targets, part.segment_ids, part.positions,
            method=Transformer.loss,
        )  # fmt: skip
