"""The activation's backward pass over expert rows, as one Triton kernel.

XLA makes three passes of it, since a reduction over a row and the two results differ in shape.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from moejax.moe.experts import LIMIT, SLOPE, Activation

ROWS, COLUMNS = 4, 512


def swiglu_backward(
    both: Float[Array, "M 2F"],
    d_hidden: Float[Array, "M F"],
    gate: Float[Array, " M"],
    used: Int[Array, ""],
    *,
    activation: Activation = "swiglu",
    interpret: bool,
) -> tuple[Float[Array, "M 2F"], Float[Array, "M F"], Float[Array, " M"]]:
    """From the gradient of h = silu(a) · b, before the combine weight, all that follows from it.

    Arithmetic is FP32. The first two results take the memory of the first two arguments.

    Args:
      both: a and b side by side.
      d_hidden: gradient of gate · h over gate.
      gate: combine weight of each row.
      used: rows that count; those after them may hold anything, and their results are zero.
      activation: another h of a and b; see ``moejax.moe.experts.activate``.
      interpret: runs on any platform, slowly.

    Returns:
      The gradient of ``both``; gate · h; and the gradient of ``gate``, in FP32.
    """
    size, width = d_hidden.shape
    columns = min(COLUMNS, pl.next_power_of_2(width))
    return pl.pallas_call(
        functools.partial(_kernel, columns=columns, activation=activation),
        out_shape=(
            jax.ShapeDtypeStruct(both.shape, both.dtype),
            jax.ShapeDtypeStruct(d_hidden.shape, d_hidden.dtype),
            jax.ShapeDtypeStruct((size,), jnp.float32),
        ),
        grid=(pl.cdiv(size, ROWS),),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(both, d_hidden, gate, used.reshape(1))


def _activation(name: Activation, a, b, weighted):
    """h, and what the gradients of a and b are for a gradient ``weighted`` of h."""
    if name == "swiglu":
        sigmoid = 1.0 / (1.0 + jnp.exp(-a))
        silu = a * sigmoid
        return silu * b, weighted * b * (sigmoid + silu * (1.0 - sigmoid)), weighted * silu
    a_passes, b_passes = a <= LIMIT, jnp.abs(b) <= LIMIT
    a, b = jnp.minimum(a, LIMIT), jnp.minimum(jnp.maximum(b, -LIMIT), LIMIT) + 1.0
    sigmoid = 1.0 / (1.0 + jnp.exp(-SLOPE * a))
    glu = a * sigmoid
    d_a = weighted * b * (sigmoid + SLOPE * glu * (1.0 - sigmoid))
    return glu * b, jnp.where(a_passes, d_a, 0.0), jnp.where(b_passes, weighted * glu, 0.0)


def _kernel(_, __, gate_ref, used_ref, both_ref, hidden_ref, d_gate_ref, *, columns, activation):
    # Read and written in place: a program touches its own rows only, each place once.
    size, width = hidden_ref.shape
    top = pl.program_id(0) * ROWS
    row = top + jnp.arange(ROWS)
    there, used = row < size, row[:, None] < triton.load(used_ref.at[pl.ds(0, 1)])[None, :]
    gate = triton.load(gate_ref.at[pl.ds(top, ROWS)], mask=there, other=0.0)
    gate = jnp.where(used, gate.astype(jnp.float32)[:, None], 0.0)

    def step(i, total):
        first = i * columns
        inside = there[:, None] & (first + jnp.arange(columns) < width)[None, :]
        place = lambda ref, start: ref.at[pl.ds(top, ROWS), pl.ds(start + first, columns)]

        def read(ref, start):
            values = triton.load(place(ref, start), mask=inside, other=0.0)
            return jnp.where(used, values.astype(jnp.float32), 0.0)

        def write(ref, start, values):
            triton.store(place(ref, start), values.astype(ref.dtype), mask=inside)

        a, b, d_hidden = read(both_ref, 0), read(both_ref, width), read(hidden_ref, 0)
        hidden, d_a, d_b = _activation(activation, a, b, d_hidden * gate)
        write(both_ref, 0, d_a)
        write(both_ref, width, d_b)
        write(hidden_ref, 0, hidden * gate)
        return total + jnp.sum(d_hidden * hidden, axis=1)

    total = jax.lax.fori_loop(0, pl.cdiv(width, columns), step, jnp.zeros(ROWS, jnp.float32))
    triton.store(d_gate_ref.at[pl.ds(top, ROWS)], total, mask=there)
