"""The exchange against the loop over all experts on one device, on 1, 2, 4 and 8 devices.

That whole models agree over meshes, drops included: tests/training/test_step.py.
"""

import contextlib
import functools

import exchanging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exchanging import EXPERTS, LENGTH, MESHES, ROUTINGS, TOKENS, TOP_K, WIDTH
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.dispatch import dispatch, drop
from moejax.moe.exchange import exchange
from moejax.moe.exchange.rows import carried_choices, round_rows
from moejax.parallel import MeshConfig, make_mesh

# Half the rows to be expected, so that even balanced routing needs several rounds.
SEVERAL = dict(factor=0.5)
CASES = [
    ("expert 2", "dense_loop", SEVERAL),
    ("fsdp 2 x expert 2", "dense_loop", SEVERAL),
    ("data 2 x expert 2 x tensor 2", "dense_loop", SEVERAL),
    ("fsdp 2 x expert 4", "blocks", SEVERAL),
    ("expert 8", "dense_loop", SEVERAL),
    ("fsdp 2 x expert 4", "grouped", SEVERAL),
    ("data 2 x expert 2 x tensor 2", "blocks", dict(kind="none")),
]
ALL = [
    (mesh, dispatcher, options)
    for mesh in MESHES
    for dispatcher in ("dense_loop", "blocks", "grouped")
    for options in (SEVERAL, dict(kind="none"), dict(factor=1.25))
]


@pytest.mark.parametrize(
    ("mesh", "dispatcher", "options"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in CASES],
)
def test_values_and_every_gradient_are_those_of_one_device(mesh, dispatcher, options):
    for name, expert in ROUTINGS.items():
        beyond = exchanging.check(mesh, expert, dispatcher=dispatcher, **options)
        several = options == SEVERAL and name != "nothing but padding"
        assert (beyond > 0) == several or options == dict(factor=1.25), name
        if name == "nothing but padding":
            (y, gradients), _ = exchanging.run(mesh, expert, dispatcher=dispatcher, **options)
            assert not any(np.any(leaf) for leaf in jax.tree.leaves((y, gradients)))


# Devices that share an expert's width add up their outputs: the last bias must be there once.
FORMS = [
    ("data 2 x expert 2 x tensor 2", "blocks", SEVERAL),
    ("data 2 x expert 2 x tensor 2", "grouped", dict(kind="none")),
    ("fsdp 2 x expert 4", "grouped", SEVERAL),
    ("expert 8", "dense_loop", dict(kind="none")),
    ("expert 8", "blocks", dict(factor=1.25)),
]


@pytest.mark.parametrize(("mesh", "dispatcher", "options"), FORMS)
def test_biases_and_the_clamped_activation_are_those_of_one_device(mesh, dispatcher, options):
    for name in ("balanced", "skewed", "nothing but padding"):
        exchanging.check(mesh, ROUTINGS[name], form="gpt-oss", dispatcher=dispatcher, **options)


@st.composite
def routings(draw):
    """Loads drawn unevenly, from balanced to experts that nobody chooses."""
    chance = [draw(st.sampled_from([0.001, 1, 1, 5, 40])) for _ in range(EXPERTS)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return exchanging.draw(rng, chance, padding=draw(st.sampled_from([0.0, 0.1, 0.7])))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(routings())
def test_drawn_loads(expert):
    exchanging.check("fsdp 2 x expert 4", expert, dispatcher="blocks", **SEVERAL)


@pytest.mark.parametrize(
    "mesh",
    ["fsdp 2 x expert 4", pytest.param("data 2 x expert 2 x tensor 2", marks=pytest.mark.slow)],
)
def test_capacity_keeps_what_it_kept_before_the_exchange(mesh):
    # 3 slots an expert in a sequence of 8 tokens: drops are decided on the whole batch, once.
    gate = exchanging.inputs()[1]
    for name in ("balanced", "skewed", "all to one device"):
        left, dropped = drop(
            jnp.asarray(ROUTINGS[name]), jnp.asarray(gate), num_experts=EXPERTS, group=LENGTH,
            slots=3,
        )  # fmt: skip
        exchanging.check(mesh, np.asarray(left), dispatcher="capacity", slots=3, **SEVERAL)
        assert float(dropped) > 0, name


def left_by_one_round(expert, shards, devices, size):
    """Choices after a single round: in each shard, the first ``size`` tokens to each device."""
    left, beyond = expert.copy(), 0
    for shard in np.arange(TOKENS).reshape(shards, -1):
        for device in range(devices):
            bound = [t for t in shard if np.any(expert[t] // (EXPERTS // devices) == device)]
            beyond += max(0, len(bound) - size)
            for t in bound[size:]:
                left[t, expert[t] // (EXPERTS // devices) == device] = EXPERTS
    return left, beyond


def test_without_further_rounds_the_rest_is_left_out_and_counted():
    options = dict(dispatcher="dense_loop", factor=0.5, exact=False)
    # Two shards of 32 tokens. P = 1 - (4 choose 2) / (8 choose 2) = 1 - 6/28; half of 32 P is
    # 12.57, so a round has 13 rows. All to one device: 19 of each shard are left out.
    assert round_rows(0.5, 32, EXPERTS, TOP_K, 2) == 13
    assert carried_choices(EXPERTS, TOP_K, 2) == TOP_K
    (y, gradients), beyond = exchanging.run("expert 2", ROUTINGS["all to one device"], **options)
    assert beyond == 2 * 19
    lost = np.arange(TOKENS) % 32 >= 13
    flat = lambda values: values.reshape(TOKENS, WIDTH)
    for values in (flat(y), flat(gradients[0]), gradients[1]):
        assert not np.any(values[lost]) and np.all(np.any(values[~lost], axis=1))
    for name, expert in ROUTINGS.items():
        left, wanted = left_by_one_round(expert, 2, 2, 13)
        got, beyond = exchanging.run("expert 2", expert, **options)
        tiny.assert_trees_close(got, exchanging.reference(left), 1e-5)
        assert beyond == wanted, name
        # The same count where further rounds take them.
        assert exchanging.run("expert 2", expert, dispatcher="dense_loop", factor=0.5)[1] == wanted


@pytest.mark.parametrize("form", ["plain", "gpt-oss"])
def test_a_batch_that_cannot_be_spread_is_computed_all_the_same(form):
    # Three rows on two devices along data, two along expert, two along tensor.
    x, gate, weights, _ = exchanging.inputs(form)
    expert = jnp.asarray(ROUTINGS["skewed"][: 3 * LENGTH])
    local = functools.partial(dispatch, "blocks")
    run = jax.jit(lambda x, expert, gate: exchange("all_to_all", local, x, expert, gate, weights))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        y, beyond = run(x[:3], expert, gate[: 3 * LENGTH])
    wanted, _ = exchanging.reference(ROUTINGS["skewed"], form)
    assert tiny.relative_error(y, wanted[:3]) < 1e-5
    assert float(beyond) == 0


@pytest.mark.parametrize("mesh", [None, MeshConfig()])
def test_one_device_runs_the_dispatcher_itself(mesh):
    x, gate, weights, _ = exchanging.inputs()
    run = functools.partial(exchange, "all_to_all", functools.partial(dispatch, "dense_loop"))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        program = str(jax.make_jaxpr(run)(x, jnp.asarray(ROUTINGS["skewed"]), gate, weights))
    assert "shard_map" not in program and "all_to_all" not in program


@pytest.mark.parametrize("kind", ["none", "all_to_all"])
def test_bfloat16_in_bfloat16_out_and_float32_gates(kind):
    x, gate, weights, cotangent = exchanging.inputs()
    narrow = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), tree)
    run = exchanging.compiled("bfloat16", kind=kind, dispatcher="blocks", **SEVERAL)
    with jax.set_mesh(make_mesh(MESHES["fsdp 2 x expert 4"])):
        (y, beyond), gradients = jax.eval_shape(
            run, narrow(x), ROUTINGS["skewed"], gate, narrow(weights), narrow(cotangent)
        )
    assert y.dtype == jnp.bfloat16 and beyond.dtype == jnp.float32
    d_x, d_gate, d_weights = gradients
    assert d_gate.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((d_x, d_weights))} == {jnp.dtype("bfloat16")}
