"""Every dispatcher against NumPy in float64: values, every gradient, every expert by itself."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.dispatch import blocks, dispatch
from moejax.moe.dispatch.blocks import BlockSize, block_sizes
from moejax.moe.dispatch.grouped import grouped
from moejax.moe.experts import ExpertWeights


class Shape(typing.NamedTuple):
    tokens: int
    experts: int
    top_k: int
    width: int
    hidden: int


# Odd sizes; every token at every expert, with loads on both sides of a block of 128; one choice of
# many experts, most of them idle. Loads and the number of tokens in use are data: nothing else is
# compiled.
SHAPES = {
    "small": Shape(22, 5, 2, 8, 6),
    "tall": Shape(150, 3, 3, 16, 12),
    "wide": Shape(40, 16, 1, 8, 16),
}

# For what a program holds, not for what it computes.
LARGE = Shape(1024, 16, 4, 16, 16)

# One line a variant. Capacity has a slot for every token at every expert, so it drops nothing.
DISPATCHERS = {
    "rounds": functools.partial(dispatch, "rounds"),
    "dense_loop": functools.partial(dispatch, "dense_loop"),
    "capacity": lambda x, *args: dispatch("capacity", x, *args, slots=len(x)),
    "blocks": functools.partial(dispatch, "blocks"),
    "blocks of 8 and 1": functools.partial(blocks, sizes=(BlockSize(8, 2), BlockSize(1, 3))),
    "grouped": functools.partial(grouped, interpret=True),
}


@functools.cache
def compiled(name):
    """Jitted: outputs, and the gradients of x, gate and the experts' weights."""

    def run(x, expert, gate, weights, cotangent):
        call = lambda x, gate, weights: DISPATCHERS[name](x, expert, gate, weights)
        y, pull_back = jax.vjp(call, x, gate, weights)
        return y, *pull_back(cotangent)

    return jax.jit(run)


@functools.cache
def inputs(shape, seed=0, dtype="float32"):
    """x, gate, weights and the outputs' cotangent. All experts differ, also in size."""
    rng = np.random.default_rng(seed)
    normal = lambda *size: rng.normal(size=size)
    experts, width, hidden = shape.experts, shape.width, shape.hidden
    size = rng.uniform(0.5, 2.0, (experts, 1, 1))
    gate_up = normal(experts, width, 2, hidden) * width**-0.5 * size[..., None]
    down = normal(experts, hidden, width) * hidden**-0.5 * size
    gate = rng.uniform(0.1, 1.0, (shape.tokens, shape.top_k))
    cast = lambda values: jnp.asarray(values, dtype)
    x, cotangent = normal(2, shape.tokens, width)
    weights = ExpertWeights(cast(gate_up), cast(down))
    return cast(x), jnp.asarray(gate, jnp.float32), weights, cast(cotangent)


def by_expert(weights):
    """The matrices one by one, so that a small expert's error is not lost in a large one's."""
    gate_up, down = np.asarray(weights.gate_up), np.asarray(weights.down)
    return [
        {"gate": gate_up[e, :, 0], "up": gate_up[e, :, 1], "down": down[e]}
        for e in range(len(down))
    ]


def result(y, d_x, d_gate, d_weights):
    return {"y": y, "x": d_x, "gate": d_gate, "experts": by_expert(d_weights)}


def numpy_layer(x, expert, gate, weights, cotangent):
    """One assignment after another in float64, with the chain rule written out."""
    x, gate, gate_up, down, cotangent = (
        np.asarray(a, np.float64) for a in (x, gate, weights.gate_up, weights.down, cotangent)
    )
    y, d_x, d_gate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    d_gate_up, d_down = np.zeros_like(gate_up), np.zeros_like(down)
    for t, k in np.ndindex(expert.shape):
        e = int(expert[t, k])
        if e >= len(down):
            continue
        g, u = x[t] @ gate_up[e, :, 0], x[t] @ gate_up[e, :, 1]
        sigmoid = 1 / (1 + np.exp(-g))
        hidden = g * sigmoid * u
        out = hidden @ down[e]
        y[t] += gate[t, k] * out
        d_gate[t, k] = cotangent[t] @ out
        d_out = gate[t, k] * cotangent[t]
        d_down[e] += np.outer(hidden, d_out)
        d_hidden = down[e] @ d_out
        d_u = d_hidden * g * sigmoid
        d_g = d_hidden * u * sigmoid * (1 + g * (1 - sigmoid))
        d_gate_up[e, :, 0] += np.outer(x[t], d_g)
        d_gate_up[e, :, 1] += np.outer(x[t], d_u)
        d_x[t] += gate_up[e, :, 0] @ d_g + gate_up[e, :, 1] @ d_u
    return result(y, d_x, d_gate, ExpertWeights(d_gate_up, d_down))


@functools.lru_cache(256)
def reference(shape, seed, dtype, choices):
    x, gate, weights, cotangent = inputs(shape, seed, dtype)
    expert = np.frombuffer(choices, np.int32).reshape(shape.tokens, shape.top_k)
    return numpy_layer(x, expert, gate, weights, cotangent)


def check_against_numpy(name, shape, expert, seed=0, dtype="float32", tolerance=1e-5):
    """Relative error tensor by tensor, and exact zeros where nobody's rows stand."""
    expert = np.ascontiguousarray(expert, np.int32)
    x, gate, weights, cotangent = inputs(shape, seed, dtype)
    out = compiled(name)(x, jnp.asarray(expert), gate, weights, cotangent)
    for got, like in zip(out, (x, x, gate, weights), strict=True):
        types = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
        assert types(got) == types(like)
    got = result(*jax.device_get(out))
    # An expert without rows has a gradient of zeros, which has to be met exactly.
    tiny.assert_trees_close(got, reference(shape, seed, dtype, expert.tobytes()), tolerance)
    nobody = expert >= shape.experts
    assert not np.any(got["y"][nobody.all(axis=1)])
    assert not np.any(got["x"][nobody.all(axis=1)])
    assert not np.any(got["gate"][nobody])


def balanced(shape):
    return np.arange(shape.tokens * shape.top_k).reshape(-1, shape.top_k) % shape.experts


def first_rows(shape, rows, expert):
    """One expert gets the first choice of so many tokens; nobody gets anything else."""
    choices = np.full((shape.tokens, shape.top_k), shape.experts)
    choices[:rows, 0] = expert
    return choices


def strangers(shape):
    """Every index from E on is nobody here, another device or padding: two rows in three."""
    return balanced(shape) + np.arange(shape.tokens)[:, None] % 3 * shape.experts


def last_experts(shape):
    """The last K experts get every token each."""
    return np.tile(np.arange(shape.experts - shape.top_k, shape.experts), (shape.tokens, 1))


def one_row(shape):
    """The last expert gets the last assignment of all."""
    choices = first_rows(shape, 0, 0)
    choices[-1, -1] = shape.experts - 1
    return choices


CASES = {
    "balanced": balanced,
    "all to the first": lambda s: first_rows(s, s.tokens, 0),
    "all to the last": lambda s: first_rows(s, s.tokens, s.experts - 1),
    "the last K experts only": last_experts,
    "one row": one_row,
    "nothing at all": lambda s: first_rows(s, 0, 0),
    "one row in three": strangers,
}


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_numpy(name, shape, case):
    check_against_numpy(name, SHAPES[shape], CASES[case](SHAPES[shape]))


@pytest.mark.parametrize("name", DISPATCHERS)
def test_groups_around_every_possible_block_size(name):
    shape = SHAPES["tall"]
    for block in (8, 16, 32, 64, 128):
        for rows in (block - 1, block, block + 1):
            check_against_numpy(name, shape, first_rows(shape, rows, 1))


@st.composite
def routings(draw):
    """A shape, and distinct experts for each token, of uneven loads; some choices are nobody's."""
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    sizes = st.sampled_from([0, 1, 1, 5, 40])
    chance = np.array([draw(sizes) for _ in range(shape.experts)], np.float64) + 1e-3
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # The K largest of noisy scores are K draws without replacement.
    noise = rng.gumbel(size=(shape.tokens, shape.experts))
    expert = np.argsort(-(np.log(chance) + noise), axis=1)[:, : shape.top_k]
    expert[rng.random(expert.shape) < draw(st.sampled_from([0, 0.3, 0.9]))] = shape.experts
    expert[draw(st.integers(0, shape.tokens)) :] = shape.experts + draw(st.sampled_from([0, 9]))
    return shape, expert, draw(st.integers(0, 3))


@pytest.mark.parametrize("name", DISPATCHERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(routing=routings())
def test_drawn_loads_equal_numpy(name, routing):
    shape, expert, seed = routing
    check_against_numpy(name, shape, expert, seed)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_bfloat16_in_and_out(name):
    # The reference computes in float64 from the same rounded inputs, so that what is left is the
    # arithmetic's own error: of the order of 2⁻⁹ = 0.002 for each rounding on the way. (Of one row
    # the gate's gradient is a single sum, whose terms may cancel to anything.)
    shape = SHAPES["tall"]
    for choices in ("balanced", "all to the last", "one row in three"):
        expert = CASES[choices](shape)
        check_against_numpy(name, shape, expert, dtype="bfloat16", tolerance=0.015)


def test_an_unknown_dispatcher_is_an_error():
    x, gate, weights, _ = inputs(SHAPES["small"])
    with pytest.raises(ValueError, match="no dispatcher 'dense'"):
        dispatch("dense", x, jnp.zeros(gate.shape, jnp.int32), gate, weights)


def primitives(jaxpr):
    """Every equation of a program, those of its loops, branches and kernels included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from primitives(getattr(value, "jaxpr", value))


def _is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def sorts_and_rows_added(run, *args):
    """Sorts of a program, and the most token vectors that one operation adds by index.

    Adding rows by index is what the derivative of a gather of rows is, unless it is written by
    hand. Adding to an expert's matrix is none: that has three axes.
    """
    sorts, rows = 0, 0
    for equation in primitives(jax.make_jaxpr(run)(*args).jaxpr):
        name = equation.primitive.name
        sorts += name == "sort"
        if name.replace("_", "-") == "scatter-add":
            operand, _, updates = (variable.aval for variable in equation.invars)
            if operand.ndim == 2:
                rows = max(rows, updates.size // operand.shape[1])
    return sorts, rows


@pytest.mark.parametrize("name", ["blocks", "grouped"])
def test_forward_and_backward_sort_once_and_do_not_differentiate_the_gathers(name):
    x, gate, weights, cotangent = inputs(LARGE)
    expert = jnp.asarray(balanced(LARGE), jnp.int32)
    sorts, rows = sorts_and_rows_added(compiled(name), x, expert, gate, weights, cotangent)
    # Blocks add to the outputs step by step, while the rows are in the cache, never all at once.
    steps = max(rows * step for rows, step in block_sizes(expert.size, LARGE.experts))
    assert sorts == 1
    assert rows <= (steps if name == "blocks" else 0) < expert.size


def test_the_count_sees_what_it_looks_for():
    x, gate, _, _ = inputs(SHAPES["small"])

    def naive(x):
        order = jnp.argsort(gate.reshape(-1))
        return jnp.sum(jax.lax.map(lambda i: x[order // 2] ** 2, order))

    assert sorts_and_rows_added(jax.grad(naive), x) == (1, gate.size)


def temporaries(name, experts):
    """Bytes of the compiled forward and backward pass, and of the weights' gradients."""
    shape = LARGE._replace(experts=experts)
    x, gate, weights, cotangent = inputs(shape)
    expert = jax.ShapeDtypeStruct(gate.shape, jnp.int32)
    program = compiled(name).lower(x, expert, gate, weights, cotangent).compile()
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    return program.memory_analysis().temp_size_in_bytes, gradients


def test_temporaries_of_blocks_do_not_grow_with_the_number_of_experts():
    # Buffers for every expert's worst case would be E · M rows, as capacity's are when it must not
    # drop. At 8 times the experts, only the weights' gradients may grow, and the part of a block
    # that each expert leaves empty.
    few, _ = temporaries("blocks", 4)
    many, gradients = temporaries("blocks", 32)
    assert many <= 1.5 * few + gradients, (few, many, gradients)
