"""A training state saved on one mesh and restored onto others: the same bits."""

import functools

import jax
import numpy as np
import pytest
import tiny

from moejax.models import AttentionConfig
from moejax.parallel import MeshConfig, make_mesh
from moejax.training.checkpoints import Checkpointer
from moejax.training.optimizers import OptimConfig, make_optimizer
from moejax.training.state import make_init

CONFIG = tiny.moe_config(attention=AttentionConfig(num_heads=4), mtp_depth=1)
SAVED_ON = MeshConfig(expert=4, data=2)
ONTO = {
    "1": MeshConfig(),
    "2, fsdp": MeshConfig(fsdp=2),
    "4, tensor": MeshConfig(tensor=4),
    "8, the same": SAVED_ON,
    "8, of every kind but data": MeshConfig(fsdp=2, expert=2, context=2),
}


def shapes(mesh):
    """The state's shapes on a mesh; nothing is compiled."""
    return make_init(CONFIG, make_optimizer(OptimConfig(), 10), make_mesh(mesh))[1]


@functools.cache
def values():
    """A state with no two values alike, on the host: moments and routers' biases too."""
    rng = np.random.default_rng(0)

    def leaf(shape):
        if np.issubdtype(shape.dtype, np.integer):
            return np.full(shape.shape, 7, shape.dtype)
        return rng.normal(size=shape.shape).astype(shape.dtype)

    return jax.tree.map(leaf, shapes(MeshConfig()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of eight devices."""
    folder = tmp_path_factory.mktemp("meshes") / "checkpoints"
    place = lambda value, leaf: jax.device_put(value, leaf.sharding)
    state = jax.tree.map(place, values(), shapes(SAVED_ON))
    assert any(len({str(s.index) for s in leaf.addressable_shards}) == 4
               for leaf in jax.tree.leaves(state.params))  # fmt: skip
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(3, state, {"data_position": 24})
    return folder


@pytest.mark.parametrize("onto", ONTO)
def test_saved_on_expert_4_x_data_2(saved, onto):
    wanted = shapes(ONTO[onto])
    with Checkpointer(saved) as checkpoints:
        restored = checkpoints.restore(wanted)
    assert restored.step == 3 and restored.messages == []
    leaves = zip(
        jax.tree.leaves_with_path(restored.state), jax.tree.leaves(wanted),
        jax.tree.leaves(values()), strict=True,
    )  # fmt: skip
    cut = 0
    for (path, leaf), shape, value in leaves:
        assert leaf.sharding == shape.sharding, path
        assert np.asarray(leaf).tobytes() == value.tobytes(), path
        cut += leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    # Of the mesh that it was saved on, experts and their two moments only.
    assert (cut >= 12) == (onto != "1")
