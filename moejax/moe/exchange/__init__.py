"""Tokens to the experts on other devices and back.

Experts are spread over the mesh's ``expert`` axis, an expert's hidden width over ``tensor``; rows
of the batch are spread over ``data``, ``fsdp`` and ``expert``, their length over ``context``.
Either the tokens travel (``all_to_all``, ``ragged_all_to_all``; see ``rounds``) or the experts'
weights do (``none``). A batch that cannot be spread is on every device, which computes what its own
experts have to do.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax.moe.exchange.placement import (
    BATCH_AXES,
    CONTEXT_AXIS,
    cut_of_tokens,
    expert_devices,
    parts_of_batch,
    parts_of_length,
    slots_in_reach,
)
from moejax.moe.exchange.rounds import exchanged, own_choices
from moejax.moe.exchange.rows import carried_choices, round_rows
from moejax.moe.experts import ExpertWeights

__all__ = [
    "BATCH_AXES", "CONTEXT_AXIS", "LocalDispatch", "cut_of_tokens", "exchange", "local_sizes",
    "parts_of_length", "slots_in_reach",
]  # fmt: skip

LocalDispatch = Callable[
    [Float[Array, "T D"], Int[Array, "T K"], Float[Array, "T K"], ExpertWeights],
    Float[Array, "T D"],
]


def exchange(
    kind: str,
    local: LocalDispatch,
    x: Float[Array, "B S D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
    *,
    factor: float = 1.25,
    exact: bool = True,
) -> tuple[Float[Array, "B S D"], Float[Array, ""]]:
    """Runs a dispatcher over the current mesh, or directly where there is none.

    Args:
      kind: ``none``, ``all_to_all`` or ``ragged_all_to_all``.
      local: dispatcher of one device.
      x: token vectors of the whole batch.
      expert: chosen experts, a token's all different; E and above for nobody (padding, dropped).
      gate: combine weights.
      weights: all experts; the mesh's ``expert`` axis divides E.
      factor: rows of one round between two devices over the number to be expected there.
      exact: further rounds for what the first one could not take; else it is left out.

    Returns:
      The combined outputs, and the rows (a token bound for one device) that the first round could
      not take.
    """
    (batch, length, width), nothing = x.shape, jnp.zeros((), jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(x.reshape(-1, width), expert, gate, weights).reshape(x.shape), nothing
    # By rows and positions: flat tokens of rows whose length is cut are not side by side.
    by_row = lambda values: values.reshape(batch, length, -1)
    inputs = x, by_row(expert), by_row(gate), weights
    parts, devices = parts_of_batch(batch), mesh.shape["expert"]
    if parts == 1:
        y = _sharded(functools.partial(_own_part, local), "expert", inputs)
        return jnp.sum(y, axis=0), nothing
    if kind == "none" or devices == 1:
        # GSPMD gathers the weights, and scatters their gradient.
        y = _sharded(lambda *inputs: local(*inputs)[None], None, inputs)
        return jnp.sum(y, axis=0), nothing
    tokens = batch * length // parts // parts_of_length(length)
    size = round_rows(factor, tokens, weights.num_experts, expert.shape[1], devices)
    travel = functools.partial(exchanged, kind, local, size, exact)
    y, beyond = _sharded(travel, "expert", inputs, with_count=True)
    return jnp.sum(y, axis=0), jnp.sum(beyond).astype(jnp.float32)


def local_sizes(
    kind: str, batch: int, length: int, num_experts: int, top_k: int, factor: float
) -> tuple[int, int, int]:
    """What a dispatcher gets on one device of the current mesh: tokens, experts, choices of each.

    Args:
      kind: the exchange that runs.
      batch: rows of the whole batch.
      length: tokens of a row.
      num_experts: E.
      top_k: K.
      factor: rows of one round between two devices over the number to be expected there.
    """
    parts, devices = parts_of_batch(batch), expert_devices()
    tokens = batch * length // parts // parts_of_length(length)
    if parts == 1:
        return tokens, num_experts // devices, top_k
    if kind == "none" or devices == 1:
        return tokens, num_experts, top_k
    rows = round_rows(factor, tokens, num_experts, top_k, devices)
    choices = carried_choices(num_experts, top_k, devices)
    return devices * rows, num_experts // devices, choices


def _sharded(run, experts, inputs, with_count=False):
    """One device's function over the mesh: what it returns stands side by side, (parts, B, S, D),
    to be summed. Inside ``shard_map`` the gradient would be a sum once more.

    Args:
      run: from a device's (x, expert, gate, weights), its tokens flat, to its part of their
        outputs, (1, T, D).
      experts: mesh axis that cuts the experts, or None.
      inputs: of all devices, by rows and positions.
      with_count: ``run`` also returns a count of its own tokens, (1,).
    """
    x, *_, weights = inputs
    rows, positions = cut_of_tokens(*x.shape[:2])
    cut = PartitionSpec(rows, positions, None)
    parts = ("tensor",) if rows else ("expert", "tensor")
    layout = weights.replace(
        gate_up=PartitionSpec(experts, None, None, "tensor"),
        down=PartitionSpec(experts, "tensor", None),
    )
    if weights.gate_up_bias is not None:
        layout = layout.replace(gate_up_bias=PartitionSpec(experts, None, "tensor"))
    if weights.down_bias is not None:
        layout = layout.replace(down_bias=PartitionSpec(experts, None))
    out = PartitionSpec(parts, rows, positions, None)

    def on_device(x, expert, gate, weights):
        flat = (values.reshape(-1, values.shape[-1]) for values in (x, expert, gate))
        found = run(*flat, _bias_once(weights))
        y, *count = found if with_count else (found,)
        y = y.reshape(1, *x.shape)
        return (y, *count) if with_count else y

    counted = (rows or ()) + ((positions,) if positions else ())
    return jax.shard_map(
        on_device,
        in_specs=(cut, cut, cut, layout),
        out_specs=(out, PartitionSpec(counted)) if with_count else out,
        check_vma=False,
    )(*inputs)


def _bias_once(weights: ExpertWeights) -> ExpertWeights:
    """The last bias on the first of the devices that share an expert's width; zeros on the others.

    Their outputs are added up.
    """
    if weights.down_bias is None:
        return weights
    first = jax.lax.axis_index("tensor") == 0
    return weights.replace(down_bias=jnp.where(first, weights.down_bias, 0))


def _own_part(local, x, expert, gate, weights):
    """What one device's experts have to do for a batch that every device has."""
    return local(x, own_choices(expert, weights.num_experts), gate, weights)[None]
