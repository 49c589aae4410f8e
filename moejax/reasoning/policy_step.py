"""One optimizer step of a policy, and log-probabilities of given responses, as pure functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from moejax.models import ModelConfig, Transformer, update_router_state
from moejax.parallel import axis_rules
from moejax.reasoning.losses import Totals, policy_loss
from moejax.reasoning.rl_config import RLConfig
from moejax.reasoning.rollouts import PolicyRows
from moejax.training.schedules import LearningRate
from moejax.training.state import TrainState

Tree = Any
# Metrics that add up over parts of a batch, and those of which the largest counts; the others are
# means over tokens, or over responses.
SUMS, LARGEST = ("loss", "surrogate", "kl", "entropy"), ("gap/max", "ratio/max")
BY_RESPONSE = ("response_length",)
BY_RATIO = ("clip/low", "clip/high", "ratio/mean")  # over responses where the ratio is theirs


@struct.dataclass
class PolicyMetrics:
    """What an optimizer step measured.

    Attributes:
      values: see ``policy_loss``.
      aux_loss: weighted auxiliary losses, the mean over parts.
      gradient_norm: before clipping.
      learning_rate: what this step used.
      tokens: that the model ran, prompts included.
      assignments: tokens that experts computed, all experts and layers added.
      router_stats: sums over the batch, by segment and layer.
    """

    values: dict[str, Float[Array, ""]]
    aux_loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Float[Array, ""]
    assignments: Float[Array, ""]
    router_stats: Tree


def make_policy_step(
    model: ModelConfig,
    rl: RLConfig,
    optimizer: optax.GradientTransformation,
    schedule: LearningRate,
    *,
    max_tokens: int,
    vocab_size: int,
) -> Callable[[TrainState, PolicyRows], tuple[TrainState, PolicyMetrics]]:
    """The function of one optimizer step, over all parts of a batch.

    Routers route as in use, without noise, as the sampler's do; their state moves once, by the
    statistics of the whole batch.

    Args:
      model: the model's config.
      rl: the algorithm, resolved.
      optimizer: of the parameters.
      schedule: its learning rate, for the metrics.
      max_tokens: longest response allowed.
      vocab_size: ids that are sampled.

    Returns:
      A function of the state and of rows with a leading axis of parts (of ``experts``' leaves
      too).
    """

    def part_loss(params, router_state, part: PolicyRows, totals: Totals, parts: int):
        variables = {"params": params, "router_state": router_state}
        out = _log_probs(model, rl, variables, part, vocab_size)
        loss, values = policy_loss(
            rl, out.log_probs, part.old, part.sampler, part.reference, part.advantages, part.mask,
            entropy=out.entropy, max_length=max_tokens, totals=totals,
        )  # fmt: skip
        return loss + out.aux_loss / parts, (values, out.aux_loss / parts, out.router_stats)

    def step(state: TrainState, rows: PolicyRows) -> tuple[TrainState, PolicyMetrics]:
        parts = rows.tokens.shape[0]
        totals = Totals.of(rows.mask.reshape(-1, rows.mask.shape[-1]))
        grad = jax.grad(part_loss, has_aux=True)
        run = lambda part: grad(state.params, state.router_state, part, totals, parts)

        grads, values, aux_loss, stats = _over_parts(rl, run, rows, totals)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(
            state.step + 1, optax.apply_updates(state.params, updates), opt_state,
            update_router_state(model, state.router_state, stats),
        )  # fmt: skip
        layers = [layer for segment in stats.values() for layer in segment.values()]
        computed = sum(jnp.sum(layer["assignments"] - layer["dropped"]) for layer in layers)
        return new, PolicyMetrics(
            values, aux_loss, optax.tree.norm(grads),
            jnp.asarray(schedule(state.step), jnp.float32),
            jnp.sum(rows.lengths - 1).astype(jnp.float32), jnp.asarray(computed, jnp.float32),
            stats,
        )  # fmt: skip

    return step


def _over_parts(rl: RLConfig, run: Callable[[PolicyRows], Tree], rows: PolicyRows, totals: Totals):
    """The sums over parts of what ``run`` gives for each; metrics as SUMS and the others say."""
    by_response = BY_RESPONSE + (BY_RATIO if rl.ratio == "sequence" else ())

    def weighed(part: PolicyRows) -> Tree:
        grads, (values, aux_loss, stats) = run(part)
        own = Totals.of(part.mask)
        tokens = own.tokens / jnp.maximum(totals.tokens, 1)
        responses = own.responses / jnp.maximum(totals.responses, 1)
        share = lambda name: responses if name in by_response else tokens
        whole = (*SUMS, *LARGEST)
        values = {k: v if k in whole else v * share(k) for k, v in values.items()}
        return grads, values, aux_loss, stats

    def add(total: Tree, part: PolicyRows) -> tuple[Tree, None]:
        found = weighed(part)
        largest = {k: jnp.maximum(total[1][k], found[1][k]) for k in LARGEST if k in found[1]}
        sums = jax.tree.map(jnp.add, total, found)
        return (sums[0], sums[1] | largest, *sums[2:]), None

    total = weighed(jax.tree.map(lambda a: a[0], rows))
    if rows.tokens.shape[0] > 1:
        total, _ = jax.lax.scan(add, total, jax.tree.map(lambda a: a[1:], rows))
    return total


def make_scorer(
    model: ModelConfig, rl: RLConfig, vocab_size: int, keep_experts: bool = False
) -> Callable[[Tree, Tree, PolicyRows], tuple[Float[Array, "B S"], Tree]]:
    """The function that gives responses' log-probabilities under a model.

    Args:
      model: its config.
      rl: the algorithm, resolved: its temperature.
      vocab_size: ids that are sampled.
      keep_experts: also give the experts that its routers choose, for replay.

    Returns:
      A function of parameters, router state and rows (one part; ``experts`` are replayed).
    """

    def score(params: Tree, router_state: Tree, rows: PolicyRows):
        variables = {"params": params, "router_state": router_state}
        if not keep_experts:
            return _log_probs(model, rl, variables, rows, vocab_size).log_probs, None
        out, kept = _log_probs(model, rl, variables, rows, vocab_size, ["router_choice"])
        return out.log_probs, kept["router_choice"]

    return score


def _log_probs(model, rl: RLConfig, variables, rows: PolicyRows, vocab_size: int, mutable=False):
    """The log-probabilities of each row's next tokens; with ``mutable``, its collections too."""
    if rows.experts is not None:
        variables = {**variables, "router_replay": rows.experts}
    width = rows.tokens.shape[1]
    targets = jnp.pad(rows.tokens[:, 1:], ((0, 0), (0, 1)))
    place = jnp.arange(width)[None]
    # Nothing follows a row's last token, so it is not run.
    segments = (place < rows.lengths[:, None] - 1).astype(jnp.int32)
    positions = jnp.broadcast_to(place, rows.tokens.shape)
    with axis_rules():
        return Transformer(model).apply(
            variables, rows.tokens, targets, segments, positions, temperature=rl.temperature,
            vocab_size=vocab_size, method=Transformer.log_probs, mutable=mutable,
        )  # fmt: skip


def parts_of(rows: PolicyRows, count: int) -> PolicyRows:
    """Rows with a leading axis of ``count`` parts."""

    def cut(leaf, axis: int = 0):
        size = leaf.shape[axis] // count
        shape = (*leaf.shape[:axis], count, size, *leaf.shape[axis + 1 :])
        return leaf.reshape(shape) if axis == 0 else jnp.moveaxis(leaf.reshape(shape), axis, 0)

    experts = jax.tree.map(lambda leaf: cut(leaf, 1), rows.experts)
    return jax.tree.map(cut, rows.replace(experts=None)).replace(experts=experts)


def rows_of(rows: PolicyRows, index: Any) -> PolicyRows:
    """Some of the rows."""
    experts = jax.tree.map(lambda leaf: leaf[:, index], rows.experts)
    return jax.tree.map(lambda leaf: leaf[index], rows.replace(experts=None)).replace(
        experts=experts
    )
