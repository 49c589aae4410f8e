"""The training state on a mesh: parameters, moments and router state lie where they should."""

import math

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from moejax.models.presets import PRESETS
from moejax.parallel import MeshConfig, make_mesh
from moejax.training.optimizers import OptimConfig, make_optimizer
from moejax.training.state import make_init

MESH = MeshConfig(fsdp=2, expert=2, tensor=2)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def abstract(request):
    """Shapes and shardings of the state; nothing is compiled."""
    optimizer = make_optimizer(OptimConfig(optimizer=request.param), 10)
    return make_init(tiny.moe_config(), optimizer, make_mesh(MESH))[1]


def test_parameters_lie_by_their_logical_names(abstract):
    params = abstract.params
    layer = params["segment_1"]["layer_0"]
    spec = lambda leaf: leaf.sharding.spec
    assert spec(params["embedding"]) == P("tensor", "fsdp")
    assert spec(params["head"]) == P("fsdp", "tensor")
    assert spec(params["final_norm"]["scale"]) == P(None)
    assert spec(layer["attention"]["query"]["kernel"]) == P(None, "fsdp", "tensor", None)
    assert spec(layer["attention"]["out"]["kernel"]) == P(None, "tensor", None, "fsdp")
    assert spec(layer["moe"]["router"]["kernel"]) == P(None, "fsdp", None)
    experts = layer["moe"]["experts"]
    assert spec(experts["gate_up"]) == P(None, "expert", "fsdp", None, "tensor")
    assert spec(experts["down"]) == P(None, "expert", "tensor", "fsdp")
    # 2 layers, 8 experts over 2, width 16 over 2, gate and up, 8 over 2.
    assert experts["gate_up"].sharding.shard_shape((2, 8, 16, 2, 8)) == (2, 4, 8, 2, 4)


def test_moments_lie_as_their_parameters_do(abstract):
    names = lambda path: tuple(part.key for part in path if hasattr(part, "key"))
    params = {names(path): leaf for path, leaf in jax.tree.leaves_with_path(abstract.params)}
    moments = 0
    for path, leaf in jax.tree.leaves_with_path(abstract.opt_state):
        owners = [keys for keys in params if names(path)[-len(keys) :] == keys]
        if owners and leaf.shape == params[owners[0]].shape:
            moments += 1
            assert leaf.sharding == params[owners[0]].sharding, path
        else:
            assert leaf.sharding.spec == P(), path
            assert leaf.size <= 3, "only counters and coefficients are whole"
    # AdamW keeps two moments of a leaf, Muon one of each of its matrices.
    matrices = 14
    total = 2 * len(params)
    assert moments in (total, total - matrices)


def test_the_rest_is_whole(abstract):
    assert abstract.step.sharding.spec == P()
    for leaf in jax.tree.leaves(abstract.router_state):
        assert leaf.sharding.spec == P()


def bytes_of(tree, local):
    """Bytes of a tree, whole or on one device."""
    shape = lambda leaf: leaf.sharding.shard_shape(leaf.shape) if local else leaf.shape
    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["olmoe_1b_7b", "llama3_1_8b"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_over_fsdp_8_a_device_holds_an_eighth(name, kind):
    """Parameters and optimizer state of published models; 1/8 within 5 %."""
    optimizer = make_optimizer(OptimConfig(optimizer=kind), 10)
    state = make_init(PRESETS[name], optimizer, make_mesh(MeshConfig(fsdp=8)))[1]
    for tree in (state.params, state.opt_state):
        assert bytes_of(tree, local=True) == pytest.approx(
            bytes_of(tree, local=False) / 8, rel=0.05
        )
    # And as much along data, where nothing is cut.
    copies = make_init(PRESETS[name], optimizer, make_mesh(MeshConfig(data=8)))[1]
    assert bytes_of(copies, local=True) == bytes_of(state, local=False)


def test_devices_hold_what_the_shardings_say():
    """Arrays, not shapes: bytes on each of eight devices."""
    config = tiny.moe_config(d_model=64, vocab_size=512, d_ff=128)
    optimizer = make_optimizer(OptimConfig(), 10)
    mesh = make_mesh(MeshConfig(fsdp=8))
    _, abstract = make_init(config, optimizer, mesh)
    zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    state = jax.tree.map(zeros, (abstract.params, abstract.opt_state))
    held = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(set(held.values())) == 1
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert held[mesh.devices.flat[0]] == pytest.approx(total / 8, rel=0.05)
