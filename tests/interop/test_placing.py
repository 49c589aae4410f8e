"""Loading onto a mesh, each device its own part; and the layouts of tensors there and back."""

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from moejax.config import ConfigError, UserError
from moejax.interop import hf, placing
from moejax.interop.quantized import Tensor
from moejax.interop.tables import Piece
from moejax.interop.tensors import SAME, Axes, Linear, Vector, halves, pairs
from moejax.parallel import MeshConfig, make_mesh

LAYOUTS = [
    (Linear(), (6, 2, 4), (8, 6)),
    (Linear(inputs=2), (2, 3, 5), (5, 6)),
    (Linear(turned=4), (6, 2, 7), (14, 6)),
    (Vector(), (3, 4), (12,)),
    (Vector(turned=4), (9,), (9,)),
    (SAME, (3, 4), (3, 4)),
    (Axes((0, 2, 1)), (3, 4, 5), (3, 5, 4)),
    (Axes((0, 3, 1, 2), split=1), (3, 4, 2, 5), (3, 10, 4)),
    (Axes((0, 1, 3, 2), split=2, gate_first=False), (3, 4, 2, 5), (3, 4, 10)),
]


@pytest.mark.parametrize("layout, shape, stored_shape", LAYOUTS)
def test_a_layout_goes_there_and_back(layout, shape, stored_shape):
    assert layout.stored_shape(shape) == stored_shape
    stored = np.arange(np.prod(shape)).reshape(stored_shape)
    ours = layout.load(stored, shape)
    assert ours.shape == shape
    np.testing.assert_array_equal(layout.save(ours), stored)


def test_rotary_channels_by_hand():
    # A head of two channels without position, then three pairs: (2, 3), (4, 5), (6, 7).
    stored = np.arange(8)[None]
    np.testing.assert_array_equal(halves(stored, 6)[0], [0, 1, 2, 4, 6, 3, 5, 7])
    np.testing.assert_array_equal(pairs(halves(stored, 6), 6), stored)


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v3") / "hf"
    return folder, checkpoints.write(
        folder, {**checkpoints.V3, "vocab_size": 22, "kv_lora_rank": 6}
    )


def test_on_a_mesh_every_device_has_its_part(v3, tmp_path):
    folder, variables = v3
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    config, placed = hf.load(folder, mesh)
    tiny.assert_trees_close(placed, variables, 0.0)
    experts = placed["params"]["segment_1"]["layer_0"]["moe"]["experts"]["gate_up"]
    assert experts.sharding.spec == P(None, "expert", "fsdp", None, "tensor")
    assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 2, 6, 2, 3)}
    bias = placed["router_state"]["segment_1"]["layer_0"]["moe"]["router"]["bias"]
    assert bias.sharding.is_fully_replicated
    hf.save(tmp_path / "again", config, placed, like=folder)
    got, wanted = checkpoints.tensors(tmp_path / "again"), checkpoints.tensors(folder)
    assert got.keys() == wanted.keys()
    assert all(got[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_saving_from_a_mesh_fetches_a_layer_at_a_time(v3, tmp_path, monkeypatch):
    folder, _ = v3
    config, placed = hf.load(folder, make_mesh(MeshConfig(expert=2)))
    fetched = []

    class Watching:
        def __getattr__(self, name):
            return getattr(np, name)

        def asarray(self, array):
            fetched.append(array.shape)
            return np.asarray(array)

    monkeypatch.setattr(hf, "np", Watching())
    hf.save(tmp_path / "again", config, placed, like=folder)
    experts = placed["params"]["segment_1"]["layer_0"]["moe"]["experts"]["gate_up"]
    assert experts.shape[0] > 1 and experts.shape not in fetched
    # Each layer once: those of the segment, and the MTP module's, which have the same shape.
    layers = [leaf for leaf in jax.tree.leaves(placed) if leaf.shape[1:] == experts.shape[1:]]
    assert fetched.count(experts.shape[1:]) == sum(leaf.shape[0] for leaf in layers)


def test_what_no_device_here_needs_is_not_read(v3):
    """A leaf of four tensors, two of which lie on devices that this process does not have."""
    read = []

    def tensor(i):
        def now():
            read.append(i)
            return np.full(3, i, np.float32)

        return Tensor(np.dtype(np.float32), (3,), "file", now)

    class Half(jax.sharding.SingleDeviceSharding):
        def addressable_devices_indices_map(self, shape):
            return {jax.devices()[0]: (slice(2, 4), slice(None))}

    pieces = [Piece(str(i), "leaf", (i, slice(None)), SAME, (3,)) for i in range(4)]
    tensors = {str(i): tensor(i) for i in range(4)}
    made = {}

    def gather(shape, sharding, arrays):
        made["parts"] = arrays
        return arrays[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing.jax, "make_array_from_single_device_arrays", gather)
        placing.place(pieces, tensors, (4, 3), np.dtype(np.float32), Half(jax.devices()[0]))
    assert read == [2, 3]
    np.testing.assert_array_equal(made["parts"][0], [[2, 2, 2], [3, 3, 3]])


def test_a_mesh_that_does_not_divide_the_model_is_refused(v3):
    folder, _ = v3
    with pytest.raises(ConfigError, match=r"mesh\.tensor"):
        hf.load(folder, make_mesh(MeshConfig(tensor=8)))


def test_types_are_kept_or_as_asked(v3, tmp_path):
    """Tensors of two types in one leaf take the wider, and go back to their own."""
    folder, _ = v3
    narrow = {
        name: array.astype(jnp.bfloat16) for name, array in checkpoints.tensors(folder).items()
    }
    wide = "model.layers.2.self_attn.o_proj.weight"
    narrow[wide] = narrow[wide].astype(np.float32)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((folder / "config.json").read_text())
    checkpoints.write_file(tmp_path / "hf" / "model.safetensors", narrow)
    config, kept = hf.load(tmp_path / "hf")
    layer = kept["params"]["segment_1"]["layer_0"]["attention"]
    assert layer["out"]["kernel"].dtype == jnp.float32
    assert layer["kv_up"]["kernel"].dtype == jnp.bfloat16
    hf.save(tmp_path / "again", config, kept, like=tmp_path / "hf")
    got = checkpoints.tensors(tmp_path / "again")
    assert {n: a.dtype for n, a in got.items()} == {n: a.dtype for n, a in narrow.items()}
    assert all(got[name].tobytes() == narrow[name].tobytes() for name in narrow)
    _, asked = hf.load(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(asked["params"])} == {jnp.dtype(jnp.bfloat16)}
    # Rounded, a selection bias would choose other experts.
    assert {leaf.dtype for leaf in jax.tree.leaves(asked["router_state"])} == {
        jnp.dtype(jnp.float32)
    }
    with pytest.raises(UserError, match="dtype = 'float8'"):
        hf.load(folder, dtype="float8")
