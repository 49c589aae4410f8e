"""The training state on a mesh: parameters, moments and router state lie where they should."""

import jax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

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
