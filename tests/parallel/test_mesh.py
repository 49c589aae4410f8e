"""Mesh shapes, the table of logical axes, and refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from moejax.config import ConfigError
from moejax.models import AttentionConfig, Transformer
from moejax.parallel import AXES, RULES, MeshConfig, check_fits, make_mesh, sharding, spec


def test_data_takes_the_devices_that_are_left():
    assert MeshConfig().shape(8) == (1, 1, 1, 1, 1)
    assert MeshConfig(data=0).shape(8) == (8, 1, 1, 1, 1)
    assert MeshConfig(data=0, expert=2, tensor=2).shape(8) == (2, 1, 2, 1, 2)
    assert MeshConfig(data=0, fsdp=3).shape(8) == (2, 3, 1, 1, 1)
    assert MeshConfig(data=0, context=4).shape(8) == (2, 1, 1, 4, 1)


def test_the_mesh_takes_the_first_devices():
    mesh = make_mesh(MeshConfig(expert=2, tensor=2))
    sizes = {"data": 1, "fsdp": 1, "expert": 2, "context": 1, "tensor": 2}
    assert dict(mesh.shape) == sizes
    assert mesh.axis_names == AXES
    assert list(mesh.devices.flat) == jax.devices()[:4]


@pytest.mark.parametrize("axes", [{"data": 9}, {"fsdp": 4, "expert": 4}, {"data": 0, "tensor": 9}])
def test_a_mesh_larger_than_the_devices_is_refused(axes):
    with pytest.raises(ConfigError, match="but there are 8; make an axis smaller"):
        make_mesh(MeshConfig(**axes))


@pytest.mark.parametrize(
    "axes", [{"data": -1}, {"fsdp": 0}, {"expert": -2}, {"context": 0}, {"tensor": 0}]
)
def test_sizes_out_of_range_are_refused(axes):
    with pytest.raises(ConfigError, match=f"mesh.{next(iter(axes))}"):
        MeshConfig(**axes)


# The tiny model: 32 ids, width 16, 4 heads over 2, dense width 24, 8 experts of width 8.
@pytest.mark.parametrize(
    ("shape", "rows", "changes", "field"),
    [
        ((2, 2, 2, 1, 1), 12, {}, "train.batch_size"),
        ((1, 1, 1, 1, 3), 8, {}, "mesh.tensor"),  # 32 ids
        ((1, 1, 1, 1, 4), 8, {}, "mesh.tensor"),  # 2 key/value heads
        ((1, 3, 1, 1, 1), 9, {}, "mesh.fsdp"),  # width 16
        ((1, 1, 3, 1, 1), 9, {}, "mesh.expert"),  # 8 experts
        ((1, 1, 1, 3, 1), 8, {}, "mesh.context"),  # rows of 8 positions
        ((1, 1, 1, 1, 2), 8, {"d_ff": 25}, "mesh.tensor"),
        ((1, 1, 1, 1, 2), 8, {"vocab_size": 33}, "mesh.tensor"),
        ((1, 1, 1, 1, 2), 8, {"moe": {"d_expert": 9}}, "mesh.tensor"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(shape, rows, changes, field):
    with pytest.raises(ConfigError) as error:
        check_fits(shape, tiny.moe_config(**changes), rows, 8)
    assert error.value.field == field
    assert "choose a" in str(error.value)


def test_meshes_that_fit():
    for shape in ((1, 1, 1, 1, 1), (2, 1, 2, 1, 2), (1, 2, 4, 1, 1), (1, 1, 1, 8, 1)):
        check_fits(shape, tiny.moe_config(), 8, 8)
    # Without MoE layers the experts' axis only spreads rows.
    check_fits((1, 1, 3, 1, 1), tiny.dense_config(), 9, 8)


def test_specs_by_logical_names():
    assert spec("embed", None, "mlp") == P("fsdp", None, "tensor")
    assert spec("batch", "length") == P(("data", "fsdp", "expert"), "context")
    mesh = make_mesh(MeshConfig())
    assert sharding(mesh, "vocab").spec == P("tensor")
    with pytest.raises(KeyError):
        spec("embedd")


MLA = AttentionConfig(
    4, kind="mla", q_lora_rank=12, kv_lora_rank=8, nope_head_dim=6, rope_head_dim=4, v_head_dim=5,
    bias="all",
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ((1, 1, 1, 1, 8), "mesh.tensor"),  # 4 heads
        ((1, 8, 1, 1, 1), "mesh.fsdp"),  # a query's latent of 12
        ((1, 4, 1, 1, 4), None),
    ],
)
def test_latent_attention_is_cut_by_its_heads_and_its_ranks(shape, field):
    if field is None:
        check_fits(shape, tiny.dense_config(attention=MLA), 8, 8)
        return
    with pytest.raises(ConfigError) as error:
        check_fits(shape, tiny.dense_config(attention=MLA), 8, 8)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("router", "attention"),
    [
        ("deepseek_v3", AttentionConfig(4, 2)),
        ("softmax_topk", AttentionConfig(4, 2, qk_norm="all", bias="all", sinks=True)),
        ("deepseek_v3", MLA),
    ],
)
def test_every_logical_name_of_the_model_is_in_the_table(router, attention, monkeypatch):
    used = set()
    constrain = nn.with_logical_constraint

    def record(x, names):
        assert len(names) == x.ndim
        used.update(names)
        return constrain(x, names)

    monkeypatch.setattr(nn, "with_logical_constraint", record)
    config = tiny.moe_config(router, attention=attention)
    boxes = jax.tree.leaves(
        tiny.shapes(config)["params"], is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes), "a leaf has no names"
    for box in boxes:
        assert len(box.names) == box.value.ndim, box
        used.update(name for name in box.names if name is not None)
    tokens = jnp.zeros((1, 4), jnp.int32)
    jax.eval_shape(Transformer(config).apply, tiny.variables(config), tokens)
    assert {"batch", "length", "embed_act", "expert", "layers"} <= used
    assert used <= RULES.keys()
    for axes in RULES.values():
        assert axes is None or {axes} <= set(AXES) or set(axes) <= set(AXES)
