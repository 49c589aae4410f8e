"""The activation's backward pass in one kernel, against XLA's and against autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hopper import kernels, lowered_for_h100

from moejax.moe.experts import activate
from moejax.moe.grouped_matmul import Choice, LayerPlan
from moejax.moe.grouped_matmul.swiglu_kernel import swiglu_backward

# Rows are no multiple of a program's, and the width is none of a step's.
ROWS, WIDTH, USED = 22, 600, 17


def inputs(dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    gate = jnp.asarray(rng.uniform(0.1, 1, ROWS), jnp.float32)
    spoil = lambda rows: rows.at[USED:].set(jnp.nan)
    # Wide enough that both limits of the clamped form are passed.
    both = spoil(6 * draw(ROWS, 2 * WIDTH))
    return both, spoil(draw(ROWS, WIDTH)), spoil(gate), jnp.int32(USED)


@functools.cache
def run(name, activation):
    if name == "pallas":
        return jax.jit(functools.partial(swiglu_backward, activation=activation, interpret=True))
    plan = LayerPlan(((("swiglu", "backward"), Choice("xla", (), "")),))
    return jax.jit(functools.partial(plan.swiglu_backward, activation=activation))


def by_autodiff(activation, both, d_hidden, gate, used):
    """The same from jax.vjp in float32, over the rows that count."""
    both, d_hidden = (a[:used].astype(jnp.float32) for a in (both, d_hidden))
    halves = lambda both: both.reshape(len(both), 2, -1)
    weighted = lambda both, gate: gate[:, None] * activate(activation, halves(both))
    hidden, pull_back = jax.vjp(weighted, both, gate[:used])
    d_both, d_gate = pull_back(d_hidden)
    return d_both, hidden, d_gate


@pytest.mark.parametrize("name", ["pallas", "xla"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 3e-3)])
@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
def test_results_equal_autodiff_and_unused_rows_are_zero(name, dtype, tolerance, activation):
    arguments = inputs(dtype)
    got = run(name, activation)(*arguments)
    assert [a.dtype for a in got] == [dtype, dtype, jnp.float32]
    for a, b in zip(got, by_autodiff(activation, *arguments[:3], USED), strict=True):
        assert tiny.relative_error(a[:USED], b) < tolerance
        assert not np.any(np.asarray(a[USED:], np.float32))


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
def test_it_lowers_for_cuda_and_works_in_place(activation):
    shape = lambda size, dtype: jax.ShapeDtypeStruct(size, dtype)
    program = lowered_for_h100(
        functools.partial(swiglu_backward, activation=activation, interpret=False),
        shape((100, 1200), jnp.bfloat16),
        shape((100, 600), jnp.bfloat16),
        shape((100,), jnp.float32),
        shape((), jnp.int32),
    )
    assert kernels(program) == 1
    assert program.count("output_operand_alias<") == 2
