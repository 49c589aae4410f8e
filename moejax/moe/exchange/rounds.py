"""Rounds of rows between the devices along ``expert``, inside ``shard_map``.

A token is sent to each device that holds any of its experts, in one row with its choices there and
their gates; that device returns the gate-weighted sum of its experts' outputs, and the sums are
added up where the token came from. A round carries at most ``size`` rows from one device to
another, so that its buffers do not depend on the load. What finds no place in the first round is
overflow: it goes with further rounds, as many as the fullest pair of devices needs, in the usual
case none.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch.gathers import pack, unpack
from moejax.moe.exchange.placement import BATCH_AXES, CONTEXT_AXIS
from moejax.moe.exchange.rows import Round, most_rows, plan_round, plan_sends


def own_choices(expert: Int[Array, "T K"], num_local: int) -> Int[Array, "T K"]:
    """Choices of the experts that stand here, counted from the first of them; others are E."""
    first = jax.lax.axis_index("expert") * num_local
    mine = (expert >= first) & (expert < first + num_local)
    return jnp.where(mine, expert - first, num_local)


def _move(kind, values, sent, received):
    """Row block j to device j, into the block of the device that it came from."""
    if kind == "all_to_all":
        return jax.lax.all_to_all(values, "expert", 0, 0, tiled=True)
    size = len(values) // len(sent)
    offsets = jnp.arange(len(sent), dtype=jnp.int32) * size
    mine = jnp.full_like(offsets, jax.lax.axis_index("expert") * size)
    return jax.lax.ragged_all_to_all(
        values, jnp.zeros_like(values), offsets, sent, mine, received, axis_name="expert"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(kind: str, values: Float[Array, "M W"], plan: Round) -> Float[Array, "M W"]:
    """A round's rows to their destinations; rows that nobody filled are zeros."""
    return _move(kind, values, plan.sent, plan.received)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_back(kind: str, values: Float[Array, "M W"], plan: Round) -> Float[Array, "M W"]:
    """The inverse of ``send``, and its transpose."""
    return _move(kind, values, plan.received, plan.sent)


send.defvjp(
    lambda kind, values, plan: (send(kind, values, plan), plan),
    lambda kind, plan, d: (send_back(kind, d, plan), None),
)
send_back.defvjp(
    lambda kind, values, plan: (send_back(kind, values, plan), plan),
    lambda kind, plan, d: (send(kind, d, plan), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_choices(
    kind: str, expert: Int[Array, "M c"], gate: Float[Array, "M c"], plan: Round
) -> tuple[Int[Array, "M c"], Float[Array, "M c"]]:
    """Experts, counted from 1, and gates, in one message of integers; 0 is nobody.

    Rows that nobody fills arrive as zeros.
    """
    message = jnp.concatenate([expert, jax.lax.bitcast_convert_type(gate, jnp.int32)], axis=1)
    expert, bits = jnp.split(_move(kind, message, plan.sent, plan.received), 2, axis=1)
    return expert, jax.lax.bitcast_convert_type(bits, jnp.float32)


send_choices.defvjp(
    lambda kind, expert, gate, plan: (send_choices(kind, expert, gate, plan), plan),
    lambda kind, plan, d: (None, send_back(kind, d[1], plan), None),
)


def _one_round(kind, local, size, expert, plan, index, x, gate, weights):
    """Rows out, the experts that stand there, sums back."""
    this = plan_round(plan, index, size)
    by_row = lambda values: values.reshape(len(this.token), -1)
    held = this.choice < expert.size
    ids = expert.reshape(-1)[jnp.minimum(this.choice, expert.size - 1)]
    gates = by_row(pack(gate.reshape(-1, 1), this.choice, this.slot))
    ids, gates = send_choices(kind, by_row(jnp.where(held, ids + 1, 0)), gates, this)
    rows = send(kind, pack(x, this.token, this.row), this)
    outputs = local(rows, own_choices(ids - 1, weights.num_experts), gates, weights)
    return unpack(send_back(kind, outputs, this), this.token, this.row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_rounds(run, x, gate, weights, expert, plan, rounds):
    """All rounds, in memory that does not depend on their number.

    ``run(expert, plan, index, x, gate, weights)`` is one of them. The first is differentiated by
    autodiff; the others save nothing and are computed again in the backward pass.
    """
    return _forward(run, x, gate, weights, expert, plan, rounds)[0]


def _forward(run, x, gate, weights, expert, plan, rounds):
    y, pull = jax.vjp(functools.partial(run, expert, plan, 0), x, gate, weights)
    add = lambda index, y: y + run(expert, plan, index, x, gate, weights)
    y = jax.lax.fori_loop(1, rounds, add, y)
    return y, (pull, x, gate, weights, expert, plan, rounds)


def _backward(run, saved, d_y):
    pull, x, gate, weights, expert, plan, rounds = saved

    def add(index, total):
        _, pull = jax.vjp(functools.partial(run, expert, plan, index), x, gate, weights)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, pull(d_y))

    def more(first):
        total = jax.tree.map(lambda g: g.astype(jnp.float32), first)
        total = jax.lax.fori_loop(1, rounds, add, total)
        return jax.tree.map(lambda t, g: t.astype(g.dtype), total, first)

    gradients = jax.lax.cond(rounds > 1, more, lambda first: first, pull(d_y))
    return (*gradients, None, None, None)


_all_rounds.defvjp(_forward, _backward)


def exchanged(kind, local, size, exact, x, expert, gate, weights):
    """One device's part of a batch that is spread, inside ``shard_map``.

    Args:
      kind: ``all_to_all`` or ``ragged_all_to_all``.
      local: dispatcher of one device.
      size: rows of one round between two devices.
      exact: further rounds for what the first one cannot take; else it is left out.
      x: this device's token vectors (T, D).
      expert: their chosen experts (T, K), E and above for nobody.
      gate: their combine weights (T, K).
      weights: this device's experts.

    Returns:
      This device's part of the combined outputs (1, T, D), to be summed over ``tensor``, and the
      rows that the first round could not take, (1,) int32.
    """
    devices = jax.lax.axis_size("expert")
    ragged = kind == "ragged_all_to_all"
    plan = plan_sends(expert, weights.num_experts, devices, ragged)
    run = functools.partial(_one_round, kind, local, size)
    counts = plan.lines.counts
    if exact and size < len(x) * most_rows(weights.num_experts * devices, plan.top_k, devices):
        # All devices together, since a round takes them all.
        rounds = jax.lax.pmax(-(-jnp.max(counts) // size), (*BATCH_AXES, CONTEXT_AXIS))
        y = _all_rounds(run, x, gate, weights, expert, plan, rounds)
    else:
        y = run(expert, plan, 0, x, gate, weights)
    beyond = jnp.sum(jnp.maximum(counts - size, 0))
    return y[None], beyond[None]
