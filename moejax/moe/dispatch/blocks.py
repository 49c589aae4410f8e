"""Dropless anywhere: rows in blocks of one expert each, in loops that stay inside the cache.

Each expert's rows are cut into large blocks, and what is left over into small ones, of which the
last is partly empty. One loop a block size runs over the blocks that hold rows, however many: a
step gathers the rows of its tokens, multiplies, and adds to the outputs. The backward pass is
written by hand. Only the first product is saved; nothing else has as many rows as there are
assignments: on a CPU, writing fresh memory costs several times what adding up in the cache does, so
that outputs are added to their tokens here (a scatter-add a step) and not gathered from a buffer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch.biases import add_down_bias
from moejax.moe.dispatch.held import Held
from moejax.moe.dispatch.sorting import sort_assignments
from moejax.moe.experts import ExpertWeights, activate, activation_gradient
from moejax.numerics.fp8 import TILE

# Rows of a step of a loop: large enough for the products, small enough for the cache.
STEP_ROWS = 512
LARGEST_BLOCK = 1024


class BlockSize(NamedTuple):
    """Blocks of one size.

    Attributes:
      rows: rows of a block.
      step: blocks of a loop's step, computed in one batched product.
    """

    rows: int
    step: int


@struct.dataclass
class Blocks:
    """The blocks of one size, which stand one after another.

    Attributes:
      expert: expert of each block.
      used: how many there are.
      start: first row.
    """

    expert: Int[Array, " N"]
    used: Int[Array, ""]
    start: Int[Array, ""]


@struct.dataclass
class BlockPlan:
    """Where assignments stand.

    Attributes:
      source: assignment (t · K + k) of each row; T · K where the row is empty.
      row: row of each assignment; R, the number of rows, where nobody here computes it.
      blocks: the blocks of each size, largest first.
    """

    source: Int[Array, " R"]
    row: Int[Array, "T K"]
    blocks: tuple[Blocks, ...]


def block_sizes(assignments: int, num_experts: int, least: int = 8) -> tuple[BlockSize, ...]:
    """Large blocks of at most an expert's fair share, and small ones for what is left over.

    Measured on two CPU cores at D256 F128: from 8 to 128 experts, balanced and skewed, other
    sizes and a third one were slower or within the noise.

    Args:
      assignments: T · K.
      num_experts: E.
      least: fewest rows of a block, a power of two up to 128.
    """
    share = max(1, assignments // num_experts)
    large = min(LARGEST_BLOCK, max(least, 1 << (share.bit_length() - 1)))
    small = min(128, large // 2)
    sizes = (large, small) if small >= least else (large,)
    return tuple(BlockSize(rows, max(1, min(STEP_ROWS, assignments) // rows)) for rows in sizes)


def plan_blocks(
    expert: Int[Array, "T K"], num_experts: int, sizes: tuple[BlockSize, ...]
) -> BlockPlan:
    """Lays assignments out: all blocks of the first size, then all of the next.

    An expert's rows fill blocks of the first size, the rest those of the next, and the last size
    takes what is left, its last block partly empty. Inside an expert the order is that of the
    assignments. Indices of E and above are left out.
    """
    plan = sort_assignments(expert, num_experts)
    flat, total = expert.reshape(-1), expert.size
    owner = jnp.minimum(flat, num_experts - 1)
    rank = plan.row.reshape(-1) - plan.starts[owner]
    size = total + num_experts * sizes[-1].rows + max(rows * step for rows, step in sizes)
    row, groups = jnp.full(total, size, jnp.int32), []
    start, placed = jnp.int32(0), jnp.zeros(num_experts, jnp.int32)
    for n, (rows, step) in enumerate(sizes):
        rest = plan.counts - placed
        last = n == len(sizes) - 1
        blocks = -(-rest // rows) if last else rest // rows
        ends = jnp.cumsum(blocks)
        # Row of an expert's first assignment of this size, less the assignments before it.
        offset = start + (ends - blocks) * rows - placed
        row = jnp.where(rank >= placed[owner], offset[owner] + rank, row)
        bound = total // rows + (num_experts if last else 0)
        if n:
            bound = min(bound, num_experts * (sizes[n - 1].rows // rows))
        ids = jnp.arange(max(1, -(-bound // step)) * step)
        block_owner = jnp.searchsorted(ends, ids, side="right").astype(jnp.int32)
        groups.append(Blocks(jnp.minimum(block_owner, num_experts - 1), ends[-1], start))
        start, placed = start + ends[-1] * rows, placed + blocks * rows
    row = jnp.where(flat < num_experts, row, size)
    source = jnp.full(size, total, jnp.int32)
    source = source.at[row].set(jnp.arange(total, dtype=jnp.int32), mode="drop")
    return BlockPlan(source, row.reshape(expert.shape), tuple(groups))


def blocks(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
    *,
    sizes: tuple[BlockSize, ...] | None = None,
) -> Float[Array, "T D"]:
    """Runs every assignment through its expert, block by block.

    Args:
      x: token vectors.
      expert: chosen experts; indices of E and above are computed by nobody here.
      gate: combine weights.
      weights: the experts. In FP8 the tiles of the weights' gradients are 128 rows of an expert
        in the order of the assignments, the last tile's rest empty.
      sizes: block sizes, each a multiple of the next; chosen by ``block_sizes`` where None. In FP8
        each a multiple of 128.

    Returns:
      The combined outputs, summed in float32.
    """
    # A block of the last size must hold a whole tile.
    least = TILE if weights.precision == "fp8" else 8
    sizes = sizes or block_sizes(expert.size, weights.num_experts, least)
    plan = plan_blocks(expert, weights.num_experts, sizes)
    y = _blocks(x, gate, weights.replace(down_bias=None), plan, sizes)
    return add_down_bias(y, expert, gate, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(x, gate, weights, plan, sizes):
    return _forward(x, gate, weights, plan, sizes)[0]


@struct.dataclass
class _Step:
    """What a step of a loop works on: ``step`` blocks, and their rows one after another."""

    at: Int[Array, ""]
    expert: Int[Array, " n"]
    token: Int[Array, " r"]
    filled: Int[Array, "r 1"]
    gate: Float[Array, "r 1"]


def _run(plan: BlockPlan, gate: Float[Array, "T K"], sizes, dtype, body, carry):
    """Runs ``body(_Step, carry)`` over the blocks that hold rows; the gates are 0 elsewhere."""
    tokens, top_k = gate.shape
    # The gates in the order of rows, with one more for empty rows.
    gates = jnp.append(gate.reshape(-1), 0).astype(dtype)[plan.source]
    for (rows, step), group in zip(sizes, plan.blocks, strict=True):
        count = rows * step

        def one(i, carry, rows=rows, step=step, count=count, group=group):
            at = group.start + i * count
            source = _slice(plan.source, at, count)
            # A step may reach into the blocks of the next size, which will write there after it.
            own = jnp.repeat(i * step + jnp.arange(step) < group.used, rows)
            filled = own & (source < tokens * top_k)
            weight = jnp.where(filled, _slice(gates, at, count), 0)
            token = jnp.minimum(source // top_k, tokens - 1)
            expert = _slice(group.expert, i * step, step)
            return body(_Step(at, expert, token, filled[:, None], weight[:, None]), carry)

        carry = jax.lax.fori_loop(0, -(-group.used // step), one, carry)
    return carry


def _slice(array: Array, start: Int[Array, ""], size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size)


def _put(array: Array, rows: Array, start: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, start, axis=0)


def _rows(values: Float[Array, "T W"], step: _Step) -> Float[Array, "r W"]:
    """Rows of the tokens of a step; zeros where there is none."""
    return jnp.where(step.filled, values.at[step.token].get(mode="promise_in_bounds"), 0)


def _add(total: Float[Array, "T W"], step: _Step, rows: Float[Array, "r W"]):
    """Adds a step's rows to their tokens, empty ones as zeros."""
    return total.at[step.token].add(rows.astype(total.dtype), mode="promise_in_bounds")


def _multiply(rows: Float[Array, "r A"], weights: Float[Array, "E A N"], step: _Step, **kwargs):
    """Each block of rows times its expert's matrix."""
    chosen = weights.at[step.expert].get(mode="promise_in_bounds")
    if len(step.expert) == 1:
        return jnp.matmul(rows, chosen[0], **kwargs)
    batched = rows.reshape(len(step.expert), -1, rows.shape[-1])
    return jnp.matmul(batched, chosen, **kwargs).reshape(len(rows), -1)


def _multiply_transposed(rows: Float[Array, "r N"], weights: Float[Array, "E A N"], step: _Step):
    """Each block of rows times the transpose of its expert's matrix."""
    return _multiply(rows, jnp.swapaxes(weights, 1, 2), step)


def _add_products(total: Float[Array, "E A N"], left, right, step: _Step):
    """Adds to each expert's float32 weight gradient what its blocks contribute, in place."""
    count = len(step.expert)
    left, right = (a.reshape(count, -1, a.shape[-1]) for a in (left, right))
    products = jnp.einsum("nra,nrb->nab", left, right, preferred_element_type=jnp.float32)
    for n in range(count):
        at = step.expert[n]
        total = _put(total, _slice(total, at, 1) + products[n : n + 1], at)
    return total


def _add_bias(rows: Float[Array, "r N"], bias: Float[Array, "E ..."] | None, step: _Step):
    """Adds to each block of rows its expert's bias, if there are biases."""
    if bias is None:
        return rows
    chosen = bias.reshape(len(bias), -1).at[step.expert].get(mode="promise_in_bounds")
    return (rows.reshape(len(chosen), -1, rows.shape[-1]) + chosen[:, None]).reshape(rows.shape)


def _add_sums(total: Float[Array, "E ..."] | None, rows: Float[Array, "r N"], step: _Step):
    """Adds to each expert's float32 bias gradient the sum of its rows; nothing without biases."""
    if total is None:
        return None
    blocks = rows.reshape(len(step.expert), -1, *total.shape[1:])
    sums = jnp.sum(blocks.astype(jnp.float32), axis=1)
    return total.at[step.expert].add(sums, mode="promise_in_bounds")


def _flat(weights: ExpertWeights) -> Float[Array, "E D 2F"]:
    return weights.gate_up.reshape(*weights.gate_up.shape[:2], -1)


def _halves(both: Float[Array, "r 2F"]) -> Float[Array, "r 2 F"]:
    return both.reshape(len(both), 2, -1)


def _forward(x, gate, weights, plan, sizes):
    up, held = _flat(weights), Held(weights.precision)

    def body(step, carry):
        saved, y = carry
        both = _multiply(held.rows(_rows(x, step)), up, step)
        both = _add_bias(both, weights.gate_up_bias, step)
        hidden = held.rows(activate(weights.activation, _halves(both)) * step.gate)
        out = _multiply(hidden, weights.down, step, preferred_element_type=jnp.float32)
        return _put(saved, both, step.at), _add(y, step, out)

    start = jnp.zeros((len(plan.source), up.shape[-1]), x.dtype), jnp.zeros(x.shape, jnp.float32)
    with held.exactly():
        both, y = _run(plan, gate, sizes, x.dtype, body, start)
    return y.astype(x.dtype), (x, gate, weights, plan, both)


def _backward(sizes, saved, d_y):
    x, gate, weights, plan, both = saved
    up, name, held = _flat(weights), weights.activation, Held(weights.precision)

    def body(step, carry):
        d_x, d_gate, d_up, d_down, d_bias = carry
        # A copy of its own: read in place, every use would slice it again.
        first = jax.lax.optimization_barrier(_slice(both, step.at, len(step.token)))
        act = activate(name, _halves(first))
        d_out = _rows(d_y, step)
        # Before the gate's factor: its product with the activations is the gate's own gradient.
        d_act = _multiply_transposed(held.rows(d_out), weights.down, step)
        d_gate = _put(d_gate, jnp.sum((d_act * act).astype(jnp.float32), axis=-1), step.at)
        d_first = activation_gradient(name, _halves(first), d_act * step.gate)
        d_first = d_first.reshape(first.shape)
        d_x = _add(d_x, step, _multiply_transposed(held.rows(d_first, 2), up, step))
        columns = lambda values: held.blocks(values, len(step.expert))
        rows, hidden = held.rows(_rows(x, step)), held.rows(act * step.gate)
        d_up = _add_products(d_up, columns(rows), columns(d_first), step)
        d_down = _add_products(d_down, columns(hidden), columns(d_out), step)
        return d_x, d_gate, d_up, d_down, _add_sums(d_bias, d_first, step)

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    bias = None if weights.gate_up_bias is None else zeros(weights.gate_up_bias.shape)
    start = zeros(x.shape), zeros(len(plan.source)), zeros(up.shape), zeros(weights.down.shape)
    with held.exactly():
        sums = _run(plan, gate, sizes, x.dtype, body, (*start, bias))
    d_x, d_gate, d_up, d_down, d_bias = sums
    d_gate = jnp.append(d_gate, 0)[plan.row].astype(gate.dtype)
    d_weights = weights.replace(gate_up=d_up, down=d_down, gate_up_bias=d_bias)
    like = lambda leaf, d_leaf: d_leaf.reshape(leaf.shape).astype(leaf.dtype)
    return d_x.astype(x.dtype), d_gate, jax.tree.map(like, weights, d_weights), None


_blocks.defvjp(_forward, _backward)
