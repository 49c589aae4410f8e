"""Tokens to the experts on other devices and back.

Experts are spread over the mesh's ``expert`` axis, an expert's hidden width over ``tensor``; rows
of the batch are spread over ``data``, ``fsdp`` and ``expert``. Devices along ``expert`` gather
one another's tokens, each computes the assignments of its own experts, and the outputs are summed
back to where the tokens came from. Nothing depends on the load, so nothing can overflow.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax.moe.experts import ExpertWeights

BATCH_AXES = ("data", "fsdp", "expert")

LocalDispatch = Callable[
    [Float[Array, "T D"], Int[Array, "T K"], Float[Array, "T K"], ExpertWeights],
    Float[Array, "T D"],
]


def exchange(
    local: LocalDispatch,
    x: Float[Array, "B S D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "B S D"]:
    """Runs a dispatcher over the current mesh, or directly where there is none.

    Args:
      local: dispatcher of one device.
      x: token vectors of the whole batch.
      expert: chosen experts; E and above for padding.
      gate: combine weights.
      weights: all experts.

    Returns:
      The combined outputs.
    """
    flat = x.reshape(-1, x.shape[-1])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(flat, expert, gate, weights).reshape(x.shape)
    # A batch that cannot be spread, a single sampled text for example, is on every device.
    spread = x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0
    rows = PartitionSpec(BATCH_AXES, None) if spread else PartitionSpec()
    specs = ExpertWeights(
        PartitionSpec("expert", None, None, "tensor"), PartitionSpec("expert", "tensor", None)
    )
    run = jax.shard_map(
        functools.partial(_gathered if spread else _replicated, local),
        in_specs=(rows, rows, rows, specs),
        out_specs=rows,
        check_vma=False,
    )
    return run(flat, expert, gate, weights).reshape(x.shape)


def _own(expert, weights):
    """Choices of the experts that stand here, counted from the first of them; others are E."""
    first = jax.lax.axis_index("expert") * weights.num_experts
    mine = (expert >= first) & (expert < first + weights.num_experts)
    return jnp.where(mine, expert - first, weights.num_experts)


def _gathered(local, x, expert, gate, weights):
    """One device's part of a batch that is spread, inside ``shard_map``."""
    gather = lambda values: jax.lax.all_gather(values, "expert", tiled=True)
    y = local(gather(x), _own(gather(expert), weights), gather(gate), weights)
    y = jax.lax.psum(y, "tensor")
    return jax.lax.psum_scatter(y, "expert", tiled=True)


def _replicated(local, x, expert, gate, weights):
    """One device's part of a batch that every device has, inside ``shard_map``."""
    y = local(x, _own(expert, weights), gate, weights)
    return jax.lax.psum(y, ("expert", "tensor"))
