"""Tokens to other devices' experts: the collectives of the program, counted.

That values, gradients and drops are those of one device: tests/training/test_step.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.moe.dispatch import dispatch
from moejax.moe.exchange import exchange
from moejax.moe.experts import ExpertWeights
from moejax.parallel import MeshConfig, make_mesh

X = jax.ShapeDtypeStruct((8, 4, 16), jnp.float32)
EXPERT = jax.ShapeDtypeStruct((32, 2), jnp.int32)
GATE = jax.ShapeDtypeStruct((32, 2), jnp.float32)
WEIGHTS = ExpertWeights(
    jax.ShapeDtypeStruct((8, 16, 2, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8, 16), jnp.float32)
)


def count(jaxpr, names):
    """How often each primitive stands in a program, inner programs included."""
    found = dict.fromkeys(names, 0)
    for equation in jaxpr.eqns:
        if equation.primitive.name in found:
            found[equation.primitive.name] += 1
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                for name, times in count(inner, names).items():
                    found[name] += times
    return found


def collectives(mesh, names):
    run = functools.partial(exchange, functools.partial(dispatch, tiny.moe_config().moe, 4))
    with jax.set_mesh(make_mesh(mesh)):
        program = jax.make_jaxpr(run)(X, EXPERT, GATE, WEIGHTS)
    return count(program.jaxpr, names)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, expert=2, tensor=2), MeshConfig(fsdp=2, expert=4)]
)
def test_three_gathers_and_one_scatter(mesh):
    # Tokens, choices and gates are gathered; outputs are summed over the width's parts, then over
    # the experts' parts back to where the tokens came from; and the drops are added up.
    names = ("all_gather", "reduce_scatter", "psum", "all_to_all", "ppermute")
    assert collectives(mesh, names) == {
        "all_gather": 3, "reduce_scatter": 1, "psum": 2, "all_to_all": 0, "ppermute": 0,
    }  # fmt: skip


def test_one_device_has_no_collectives():
    names = ("shard_map", "all_gather", "reduce_scatter", "psum")
    assert not any(collectives(MeshConfig(), names).values())


@pytest.mark.parametrize("dispatcher", ["blocks", "capacity"])
def test_a_batch_that_cannot_be_spread_is_computed_all_the_same(dispatcher):
    # Three rows on two devices along data, two along expert, two along tensor.
    config = tiny.moe_config(dispatch=dispatcher, moe={"capacity_factor": 0.5}).moe
    run = jax.jit(functools.partial(exchange, functools.partial(dispatch, config, 4)))
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    expert = rng.permuted(np.tile(np.arange(8), (12, 1)), axis=1)[:, :2].astype(np.int32)
    inputs = draw((3, 4, 16)), expert, draw((12, 2)), jax.tree.map(lambda w: draw(w.shape), WEIGHTS)
    wanted, drops = run(*inputs)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        got, dropped = run(*inputs)
    assert tiny.relative_error(got, wanted) < 1e-5
    assert float(dropped) == float(drops)
    assert (float(drops) > 0) == (dispatcher == "capacity")
