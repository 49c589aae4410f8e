"""Rounds: the collectives they take, with bytes, and the ragged exchange."""

import collections
import functools

import exchanging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exchanging import EXPERTS, HIDDEN, MESHES, ROUTINGS, TOP_K, WIDTH
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moejax.moe.dispatch import dispatch
from moejax.moe.exchange import exchange
from moejax.moe.exchange.rows import carried_choices, round_rows
from moejax.parallel import AXES, make_mesh

COLLECTIVES = {"psum", "pmax", "all_to_all", "ragged_all_to_all", "all_gather", "reduce_scatter"}


def collective_bytes(jaxpr, loop=False):
    """(name, in a loop) -> bytes of each first operand, of one device, inner programs included."""
    found = collections.defaultdict(list)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in COLLECTIVES:
            aval = equation.invars[0].aval
            found[name, loop].append(aval.size * aval.dtype.itemsize)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                for key, sizes in collective_bytes(inner, loop or name == "while").items():
                    found[key] += sizes
    return {key: sorted(sizes) for key, sizes in found.items()}


def programs(mesh, kind, **options):
    """Collectives of the forward pass, and of forward and backward together."""
    x, gate, weights, cotangent = exchanging.inputs()
    expert = jnp.asarray(ROUTINGS["skewed"])
    local = functools.partial(dispatch, "dense_loop")
    forward = functools.partial(exchange, kind, local, factor=0.5, **options)
    both = exchanging.compiled(mesh, kind=kind, dispatcher="dense_loop", factor=0.5, **options)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        one = jax.make_jaxpr(forward)(x, expert, gate, weights)
        two = jax.make_jaxpr(both)(x, expert, gate, weights, cotangent)
    return collective_bytes(one.jaxpr), collective_bytes(two.jaxpr)


# Two rows of D = 16 to each of four devices; one choice and its gate a row; 4 bytes a number.
assert round_rows(0.5, 8, EXPERTS, TOP_K, 4) == 2 and carried_choices(EXPERTS, TOP_K, 4) == 1
VECTORS, CHOICES, GATES = 4 * 2 * 16 * 4, 4 * 2 * 2 * 4, 4 * 2 * 1 * 4
# Gradients of a device's two experts; of eight tokens and their gates, over the width's parts.
UP, DOWN = 2 * WIDTH * 2 * HIDDEN * 4, 2 * HIDDEN * WIDTH * 4
TOKENS_OF_ONE = [8 * TOP_K * 4, 8 * WIDTH * 4]


def test_all_to_all_takes_three_messages_a_round_and_three_more_backward():
    forward, both = programs("fsdp 2 x expert 4", "all_to_all")
    # Out: vectors; choices with gates. Back: vectors. Then the same in the loop of further rounds,
    # and the largest number of rounds.
    out_and_back = sorted([VECTORS, CHOICES, VECTORS])
    assert forward == {
        ("all_to_all", False): out_and_back, ("all_to_all", True): out_and_back,
        ("pmax", False): [4],
    }  # fmt: skip
    # Backward: the outputs' gradient out; the vectors' and the gates' back. A further round is
    # computed again first.
    backward = [VECTORS, VECTORS, GATES]
    assert both == {
        ("all_to_all", False): sorted(out_and_back + backward),
        ("all_to_all", True): sorted(2 * out_and_back + backward),
        ("pmax", False): [4],
        ("psum", False): sorted([UP, DOWN, *TOKENS_OF_ONE]),
    }


def test_leaving_the_rest_out_takes_no_loop():
    forward, _ = programs("fsdp 2 x expert 4", "all_to_all", exact=False)
    assert forward == {("all_to_all", False): sorted([VECTORS, CHOICES, VECTORS])}


def test_ragged_takes_the_same_messages_and_one_of_counts():
    forward, both = programs("fsdp 2 x expert 4", "ragged_all_to_all")
    out_and_back, backward = sorted([VECTORS, CHOICES, VECTORS]), [VECTORS, VECTORS, GATES]
    assert forward == {
        ("ragged_all_to_all", False): out_and_back, ("ragged_all_to_all", True): out_and_back,
        ("all_to_all", False): [4 * 4], ("pmax", False): [4],
    }  # fmt: skip
    assert both["ragged_all_to_all", False] == sorted(out_and_back + backward)
    assert both["ragged_all_to_all", True] == sorted(2 * out_and_back + backward)
    assert both["all_to_all", False] == [4 * 4]


def test_without_exchange_only_weights_travel():
    forward, both = programs("fsdp 2 x expert 4", "none")
    assert forward == {}
    # All eight experts' gradients on every device.
    assert both == {("psum", False): sorted([4 * UP, 4 * DOWN, *TOKENS_OF_ONE])}
    # GSPMD gathers each matrix along fsdp and along expert, and sends no token anywhere.
    devices = make_mesh(MESHES["fsdp 2 x expert 4"])
    x, gate, weights, cotangent = exchanging.place(devices, *exchanging.inputs())
    run = exchanging.compiled("fsdp 2 x expert 4", kind="none", dispatcher="dense_loop", factor=0.5)
    with jax.set_mesh(devices):
        lowered = run.lower(x, jnp.asarray(ROUTINGS["skewed"]), gate, weights, cotangent)
        program = lowered.compile().as_text()
    assert program.count(" all-gather(") == 4 and " all-to-all(" not in program


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """``jax.lax.ragged_all_to_all`` by its documentation, from gathers.

    Device s sends ``operand[input_offsets[d]:][:send_sizes[d]]`` to device d, which writes it at
    the sender's ``output_offsets[d]``; ``recv_sizes`` has to be what each device sends.
    """
    operands, starts, sizes, targets = (
        jax.lax.all_gather(value, axis_name)
        for value in (operand, input_offsets, send_sizes, output_offsets)
    )
    me, rows = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    result = output
    for source in range(len(send_sizes)):
        target = targets[source, me]
        inside = (rows >= target) & (rows < target + recv_sizes[source])
        place = jnp.clip(starts[source, me] + rows - target, 0, len(operand) - 1)
        result = jnp.where(inside[:, None], operands[source][place], result)
        broken = recv_sizes[source] != sizes[source, me]
        result = jnp.where(broken, jnp.full_like(result, -(2**20)), result)
    return result


def test_ragged_gives_what_all_to_all_gives(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    options = dict(kind="ragged_all_to_all", dispatcher="dense_loop", factor=0.5)
    for name in ("balanced", "skewed", "all to one device"):
        beyond = exchanging.check("expert 4", ROUTINGS[name], **options)
        assert beyond > 0, name


def test_the_emulation_by_the_documentations_example(monkeypatch):
    # Axis of size 2; each device's operand, offsets and sizes as in the documentation.
    operand = jnp.array([[[1], [2], [2]], [[3], [4], [0]]])
    sizes = dict(
        input_offsets=jnp.array([[0, 1], [0, 1]]), send_sizes=jnp.array([[1, 2], [1, 1]]),
        output_offsets=jnp.array([[0, 0], [1, 2]]), recv_sizes=jnp.array([[1, 1], [2, 1]]),
    )  # fmt: skip
    run = lambda operand, *rest: emulated(
        operand, jnp.zeros((4, 1), jnp.int32), *rest, axis_name="i"
    )
    got = jax.vmap(run, axis_name="i")(operand, *sizes.values())
    np.testing.assert_array_equal(got[:, :, 0], [[1, 3, 0, 0], [2, 2, 4, 0]])


def test_ragged_lowers_for_cuda_forward_and_backward():
    x, gate, weights, cotangent = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), exchanging.inputs()
    )
    expert = jax.ShapeDtypeStruct(gate.shape, jnp.int32)
    run = exchanging.compiled("cuda", kind="ragged_all_to_all", dispatcher="dense_loop", factor=0.5)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1, 2, 4, 1, 1), AXES, (AxisType.Auto,) * 5, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = run.trace(x, expert, gate, weights, cotangent)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    # As counted above: 6 of the first round and 9 in the loops; or 8, since what a further round
    # sends back is not needed where it is computed again.
    assert program.count("@ragged_all_to_all(") in (14, 15)


def test_tolerances_would_see_a_swapped_expert():
    # The exchanging itself: another routing of one token is far beyond the tolerance.
    expert = ROUTINGS["skewed"].copy()
    t = int(np.flatnonzero(expert[:, 0] < EXPERTS)[0])
    expert[t, 0] = next(e for e in range(EXPERTS) if e not in expert[t])
    got, wanted = exchanging.reference(expert), exchanging.reference(ROUTINGS["skewed"])
    with pytest.raises(AssertionError):
        tiny.assert_trees_close(got, wanted, 1e-5)
