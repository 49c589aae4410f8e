"""Top-k of each token where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.moe import rowwise
from moejax.moe.exchange import BATCH_AXES
from moejax.moe.routers import DeepSeekV3Options, DeepSeekV3Router, RouterInputs
from moejax.parallel import MeshConfig, make_mesh, sharding
from moejax.parallel.collectives import collectives_on


@pytest.mark.parametrize("shape", [(16, 12), (16, 3, 4), (15, 12)])
def test_values_places_and_gradients_are_those_of_jax(shape):
    rng = np.random.default_rng(0)
    values, weight = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (shape, shape[:-1]))

    def both(top_k):
        run = lambda v: (top_k(v, 2)[0] * weight[..., None]).sum()
        return (*top_k(values, 2), jax.grad(run)(values))

    wanted = both(jax.lax.top_k)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, context=2))):
        for ours, theirs in zip(both(rowwise.top_k), wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"fsdp": 2, "context": 4}])
def test_a_router_gathers_no_token(sizes):
    # With groups, as DeepSeek-V3: three top-k a token. Rows of a device: two, or one cut in four.
    rows = 8 if "data" in sizes else 2
    options = DeepSeekV3Options(num_groups=4, groups_kept=2)
    router = DeepSeekV3Router(options, num_experts=16, top_k=3)
    mesh = make_mesh(MeshConfig(**sizes))
    inputs = lambda x: RouterInputs(x, jnp.ones(x.shape[:2], bool))
    shape = jax.ShapeDtypeStruct((rows, 16, 8), jnp.float32)
    variables = jax.eval_shape(lambda x: router.init(jax.random.key(0), inputs(x)), shape)
    whole = NamedSharding(mesh, P())
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    variables = jax.tree.map(lambda leaf: place(leaf, whole), jax.tree.map(lambda a: a, variables))
    run = lambda variables, x: router.apply(variables, inputs(x)).replace(rows=None)
    with jax.set_mesh(mesh):
        x = place(shape, sharding(mesh, "batch", "length", None))
        program = jax.jit(run).lower(variables, x).compile().as_text()
    gathers = [one for one in collectives_on(program, mesh) if one.kind == "all-gather"]
    batch = (*BATCH_AXES, "context")
    assert not [one for one in gathers if set(one.axes) & set(batch) and one.elements > 16], gathers
