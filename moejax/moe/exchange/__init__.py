"""Tokens to the experts on other devices and back.

Experts are spread over the mesh's ``expert`` axis, an expert's hidden width over ``tensor``; rows
of the batch are spread over ``data``, ``fsdp`` and ``expert``. Either the tokens travel
(``all_to_all``, ``ragged_all_to_all``; see ``rounds``) or the experts' weights do (``none``). A
batch that cannot be spread is on every device, which computes what its own experts have to do.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax.moe.exchange.placement import (
    BATCH_AXES,
    expert_devices,
    parts_of_batch,
    rows_in_reach,
)
from moejax.moe.exchange.rounds import exchanged, own_choices
from moejax.moe.exchange.rows import carried_choices, round_rows
from moejax.moe.experts import ExpertWeights

__all__ = ["BATCH_AXES", "LocalDispatch", "exchange", "local_sizes", "rows_in_reach"]

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
    flat, nothing = x.reshape(-1, x.shape[-1]), jnp.zeros((), jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(flat, expert, gate, weights).reshape(x.shape), nothing
    inputs = flat, expert, gate, weights
    parts, devices = parts_of_batch(x.shape[0]), mesh.shape["expert"]
    if parts == 1:
        y = _sharded(functools.partial(_own_part, local), None, "expert", inputs)
        return _sum(y, x.shape), nothing
    if kind == "none" or devices == 1:
        # GSPMD gathers the weights, and scatters their gradient.
        stay = lambda *inputs: local(*inputs)[None]
        return _sum(_sharded(stay, BATCH_AXES, None, inputs), x.shape), nothing
    size = round_rows(factor, len(flat) // parts, weights.num_experts, expert.shape[1], devices)
    travel = functools.partial(exchanged, kind, local, size, exact)
    y, beyond = _sharded(travel, BATCH_AXES, "expert", inputs, with_count=True)
    return _sum(y, x.shape), jnp.sum(beyond).astype(jnp.float32)


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
    tokens = batch * length // parts
    if parts == 1:
        return tokens, num_experts // devices, top_k
    if kind == "none" or devices == 1:
        return tokens, num_experts, top_k
    rows = round_rows(factor, tokens, num_experts, top_k, devices)
    choices = carried_choices(num_experts, top_k, devices)
    return devices * rows, num_experts // devices, choices


def _sharded(run, rows, experts, inputs, with_count=False):
    """One device's function over the mesh: what it returns stands side by side, (parts, T, D).

    Args:
      run: from a device's (x, expert, gate, weights) to its part of the outputs, (1, T, D).
      rows: mesh axes that cut the tokens; None where every device has them all.
      experts: mesh axis that cuts the experts, or None.
      inputs: of all devices.
      with_count: ``run`` also returns a count of its own tokens, (1,).
    """
    cut = PartitionSpec(rows, None)
    parts = ("tensor",) if rows else ("expert", "tensor")
    weights = inputs[-1]
    layout = weights.replace(
        gate_up=PartitionSpec(experts, None, None, "tensor"),
        down=PartitionSpec(experts, "tensor", None),
    )
    if weights.gate_up_bias is not None:
        layout = layout.replace(gate_up_bias=PartitionSpec(experts, None, "tensor"))
    if weights.down_bias is not None:
        layout = layout.replace(down_bias=PartitionSpec(experts, None))
    out = PartitionSpec(parts, rows, None)
    return jax.shard_map(
        lambda x, expert, gate, weights: run(x, expert, gate, _bias_once(weights)),
        in_specs=(cut, cut, cut, layout),
        out_specs=(out, PartitionSpec(rows)) if with_count else out,
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


def _sum(parts, shape):
    """Adds up the devices' parts. Inside ``shard_map`` the gradient would be a sum once more."""
    return jnp.sum(parts, axis=0).reshape(shape)


def _own_part(local, x, expert, gate, weights):
    """What one device's experts have to do for a batch that every device has."""
    return local(x, own_choices(expert, weights.num_experts), gate, weights)[None]
