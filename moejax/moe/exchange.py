"""Tokens to the experts on other devices and back.

Experts are spread over the mesh's ``expert`` axis, an expert's hidden width over ``tensor``; rows
of the batch are spread over ``data``, ``fsdp`` and ``expert``. Devices along ``expert`` gather
one another's tokens, each computes the assignments of its own experts, and the outputs are summed
back to where the tokens came from. Nothing depends on the load, so nothing can overflow.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax.moe.experts import ExpertWeights

BATCH_AXES = ("data", "fsdp", "expert")

LocalDispatch = Callable[
    [Float[Array, "T D"], Int[Array, "T K"], Float[Array, "T K"], ExpertWeights],
    tuple[Float[Array, "T D"], Float[Array, ""]],
]


def exchange(
    local: LocalDispatch,
    x: Float[Array, "B S D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
) -> tuple[Float[Array, "B S D"], Float[Array, ""]]:
    """Runs a dispatcher over the current mesh, or directly where there is none.

    Args:
      local: dispatcher of one device.
      x: token vectors of the whole batch.
      expert: chosen experts; E and above for padding.
      gate: combine weights.
      weights: all experts.

    Returns:
      The combined outputs, and the number of dropped assignments of the whole batch.
    """
    flat = x.reshape(-1, x.shape[-1])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        y, dropped = local(flat, expert, gate, weights)
        return y.reshape(x.shape), dropped
    rows = PartitionSpec(BATCH_AXES, None)
    specs = ExpertWeights(
        PartitionSpec("expert", None, None, "tensor"), PartitionSpec("expert", "tensor", None)
    )
    run = jax.shard_map(
        functools.partial(_gathered, local),
        in_specs=(rows, rows, rows, specs),
        out_specs=(rows, PartitionSpec()),
        check_vma=False,
    )
    y, dropped = run(flat, expert, gate, weights)
    return y.reshape(x.shape), dropped


def _gathered(local, x, expert, gate, weights):
    """One device's part, inside ``shard_map``."""
    gather = lambda values: jax.lax.all_gather(values, "expert", tiled=True)
    first = jax.lax.axis_index("expert") * weights.num_experts
    chosen = gather(expert)
    mine = (chosen >= first) & (chosen < first + weights.num_experts)
    chosen = jnp.where(mine, chosen - first, weights.num_experts)
    y, dropped = local(gather(x), chosen, gather(gate), weights)
    y = jax.lax.psum(y, "tensor")
    y = jax.lax.psum_scatter(y, "expert", tiled=True)
    return y, jax.lax.psum(dropped, BATCH_AXES)
