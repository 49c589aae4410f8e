"""Dropless: assignments sorted by expert into blocks of rows, one expert a block.

Each expert's rows are padded to a whole number of blocks, so that at most E blocks are partly
empty, whatever the load. The forward and the backward pass are loops over the blocks that hold
rows; the backward one is written by hand: it adds weight gradients in place, and saves only the
first product and the plan.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.moe.experts import ExpertWeights, swiglu, swiglu_gradient


@struct.dataclass
class BlockPlan:
    """Where assignments stand in the blocks.

    Attributes:
      source: assignment (t · K + k) of each block row; T · K where the row is padding.
      row: block row of each assignment; M where nobody here computes it.
      expert: expert of each block.
      used: number of blocks that hold rows, the first ones.
    """

    source: Int[Array, " M"]
    row: Int[Array, "T K"]
    expert: Int[Array, " M_over_block"]
    used: Int[Array, ""]


def default_block_size(assignments: int, num_experts: int) -> int:
    """Rows of a block: about half an expert's fair share, a power of two from 8 to 128."""
    share = max(1, assignments // (2 * num_experts))
    return min(128, max(8, 1 << (share.bit_length() - 1)))


def plan_blocks(expert: Int[Array, "T K"], num_experts: int, block: int) -> BlockPlan:
    """Sorts assignments by expert into blocks of ``block`` rows; indices of E and above are left
    out. The order inside an expert is that of the assignments."""
    flat = expert.reshape(-1)
    total = len(flat)
    num_blocks = total // block + num_experts
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=num_experts + 1)[:num_experts]
    starts = jnp.cumsum(counts) - counts
    blocks = -(-counts // block)
    block_ends = jnp.cumsum(blocks)
    block_starts = block_ends - blocks
    block_ids = jnp.arange(num_blocks)
    owner = jnp.searchsorted(block_ends, block_ids, side="right").astype(jnp.int32)
    owner = jnp.minimum(owner, num_experts - 1)
    # Rank of each block row inside its expert, and from it the assignment that stands there.
    rank = ((block_ids - block_starts[owner]) * block)[:, None] + jnp.arange(block)[None]
    filled = (rank < counts[owner][:, None]) & (block_ids < block_ends[-1])[:, None]
    place = jnp.minimum(starts[owner][:, None] + rank, total - 1)
    source = jnp.where(filled, order[place], total).reshape(-1).astype(jnp.int32)
    size = num_blocks * block
    row = jnp.full(total + 1, size, jnp.int32).at[source].set(jnp.arange(size, dtype=jnp.int32))
    # Padding rows all wrote to the spare last entry, which is cut off here.
    return BlockPlan(source, row[:total].reshape(expert.shape), owner, block_ends[-1])


def blocks(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
    *,
    block: int,
) -> Float[Array, "T D"]:
    """Runs every assignment through its expert, block by block.

    Args:
      x: token vectors.
      expert: chosen experts; indices of E and above are computed by nobody here.
      gate: combine weights.
      weights: the experts.
      block: rows of a block.

    Returns:
      The combined outputs.
    """
    plan = plan_blocks(expert, weights.num_experts, block)
    return _expert_blocks(x, gate, weights.gate_up, weights.down, plan, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _expert_blocks(x, gate, gate_up, down, plan, block):
    return _forward(x, gate, gate_up, down, plan, block)[0]


def _rows(values: Float[Array, "T D"], source: Int[Array, " b"], top_k: int):
    """Rows of the tokens that the assignments ``source`` belong to; zeros for padding."""
    filled = (source < len(values) * top_k)[:, None]
    return jnp.where(filled, values[jnp.minimum(source // top_k, len(values) - 1)], 0)


def _combine(buffer: Float[Array, "M D"], row: Int[Array, "T K"], gate: Float[Array, "T K"] | None):
    """Sums, for each token, its K rows of the buffer, weighted; rows of M and above are zeros."""
    here = row < len(buffer)
    weight = here if gate is None else jnp.where(here, gate, 0)
    rows = buffer[jnp.minimum(row, len(buffer) - 1)]
    return jnp.einsum("tkd,tk->td", rows, weight.astype(buffer.dtype))


def _slice(array: Array, index: Int[Array, ""], size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, index * size, size)


def _put(array: Array, rows: Array, index: Int[Array, ""], size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, index * size, axis=0)


def _forward(x, gate, gate_up, down, plan, block):
    num_experts, width, _, hidden = gate_up.shape
    size = len(plan.source)
    up = gate_up.reshape(num_experts, width, 2 * hidden)

    def body(i, carry):
        saved, outputs = carry
        e = plan.expert[i]
        rows = _rows(x, _slice(plan.source, i, block), gate.shape[1])
        both = jnp.matmul(rows, up[e])
        out = jnp.matmul(swiglu(both.reshape(block, 2, hidden)), down[e])
        return _put(saved, both, i, block), _put(outputs, out, i, block)

    start = (jnp.zeros((size, 2 * hidden), x.dtype), jnp.zeros((size, width), x.dtype))
    both, outputs = jax.lax.fori_loop(0, plan.used, body, start)
    return _combine(outputs, plan.row, gate), (x, gate, gate_up, down, plan, both)


def _backward(block, saved, d_y):
    x, gate, gate_up, down, plan, both = saved
    num_experts, width, _, hidden = gate_up.shape
    size, top_k = len(plan.source), gate.shape[1]
    up = gate_up.reshape(num_experts, width, 2 * hidden)
    gate_rows = jnp.append(gate.reshape(-1), 0)[plan.source].astype(x.dtype)

    def body(i, carry):
        d_rows, d_gate, d_up, d_down = carry
        e, source = plan.expert[i], _slice(plan.source, i, block)
        weight = _slice(gate_rows, i, block)[:, None]
        first = _slice(both, i, block).reshape(block, 2, hidden)
        act = swiglu(first)
        d_out = _rows(d_y, source, top_k)
        # Before the gate's factor: its product with the activations is the gate's own gradient.
        d_act = jnp.matmul(d_out, down[e].T)
        d_gate = _put(d_gate, jnp.sum((d_act * act).astype(jnp.float32), axis=-1), i, block)
        d_first = swiglu_gradient(first, d_act * weight).reshape(block, 2 * hidden)
        d_rows = _put(d_rows, jnp.matmul(d_first, up[e].T), i, block)
        product = lambda a, b: jnp.matmul(a.T, b, preferred_element_type=jnp.float32)
        d_up = d_up.at[e].add(product(_rows(x, source, top_k), d_first))
        d_down = d_down.at[e].add(product(act * weight, d_out))
        return d_rows, d_gate, d_up, d_down

    start = (
        jnp.zeros((size, width), x.dtype),
        jnp.zeros(size, jnp.float32),
        jnp.zeros(up.shape, jnp.float32),
        jnp.zeros(down.shape, jnp.float32),
    )
    d_rows, d_gate, d_up, d_down = jax.lax.fori_loop(0, plan.used, body, start)
    d_gate = jnp.append(d_gate, 0)[plan.row].astype(gate.dtype)
    return (
        _combine(d_rows, plan.row, None),
        d_gate,
        d_up.reshape(gate_up.shape).astype(gate_up.dtype),
        d_down.astype(down.dtype),
        None,
    )


_expert_blocks.defvjp(_forward, _backward)
