"""Rows whose length is cut over the mesh: the values and gradients of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moejax.models import AttentionConfig, Transformer
from moejax.models.attend import attend
from moejax.models.attention import attention_mask
from moejax.models.attention_config import RopeConfig
from moejax.models.causal_attention import causal_attention
from moejax.models.loss import chunked_cross_entropy_and_guess
from moejax.moe.exchange.placement import cut_of_tokens, parts_of_length, slots_in_reach
from moejax.parallel import MeshConfig, axis_rules, make_mesh, sharding

LENGTH = 16
MLA = AttentionConfig(
    4, kind="mla", q_lora_rank=12, kv_lora_rank=8, nope_head_dim=6, rope_head_dim=4, v_head_dim=5,
    bias="all", rope=RopeConfig(scaling="yarn", factor=4.0, original_length=4),
)  # fmt: skip
WINDOWS = AttentionConfig(4, 2, window=3, sinks=True, qk_norm="head")
MODELS = {
    "mla, mtp": tiny.moe_config(attention=MLA, num_layers=2, mtp_depth=1, loss_chunk=3),
    "windows, sinks, drops": tiny.moe_config(
        "softmax_topk", "capacity", moe={"capacity_factor": 0.7}, attention=WINDOWS, loss_chunk=5,
        first_k_dense=0, num_layers=2, segments=((("moe_window", "moe"), 1),),
    ),
    "dense, remat": tiny.dense_config(remat="full"),
    "fp8 mla": tiny.moe_config(attention=MLA, precision="fp8"),
}  # fmt: skip
MESHES = {
    "expert 2 x context 2 x tensor 2": MeshConfig(expert=2, context=2, tensor=2),
    "data 2 x context 4": MeshConfig(data=2, context=4),
    "context 8": MeshConfig(context=8),
    "fsdp 2 x expert 2 x context 2": MeshConfig(fsdp=2, expert=2, context=2),
    "expert 2 x context 4": MeshConfig(expert=2, context=4),
}


def gradients(config):
    """Jitted gradients of the whole loss in the parameters, with its parts beside them."""

    def objective(params, state, part):
        with axis_rules():
            out = Transformer(config).apply(
                {"params": params, **state}, part.tokens, part.targets, part.segment_ids,
                part.positions, train=True, mtp=True, method=Transformer.loss,
                rngs={"router": jax.random.key(0)},
            )  # fmt: skip
        total = out.nll / out.targets + out.aux_loss
        return total if out.mtp is None else total + 0.3 * out.mtp.loss, out

    return jax.jit(jax.grad(objective, has_aux=True))


@functools.cache
def found(model, mesh=None):
    """What a model's step gives on a mesh, or on one device."""
    config = MODELS[model]
    state = tiny.variables(config)
    params, part = state.pop("params"), jax.tree.map(lambda a: a[0], tiny.batch(1, 8, LENGTH))
    if mesh is None:
        return jax.device_get(gradients(config)(params, state, part))
    devices = make_mesh(mesh)
    part = jax.device_put(part, sharding(devices, "batch", "length"))
    with jax.set_mesh(devices):
        return jax.device_get(gradients(config)(params, state, part))


QUICK = [
    ("mla, mtp", "expert 2 x context 2 x tensor 2"),
    ("windows, sinks, drops", "data 2 x context 4"),
]
ALL = [
    pair for model in MODELS for mesh in MESHES
    if model != "fp8 mla" and (pair := (model, mesh)) not in QUICK
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "mesh"), QUICK + [pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL]
)
def test_values_gradients_and_statistics_are_those_of_one_device(model, mesh):
    (wanted, one), (got, cut) = found(model), found(model, MESHES[mesh])
    tiny.assert_trees_close(got, wanted, 1e-5)
    for name in ("nll", "targets", "aux_loss", "mtp"):
        tiny.assert_trees_close(getattr(cut, name), getattr(one, name), 1e-5)
    for path, values in jax.tree.leaves_with_path(cut.router_stats):
        name, alone = path[-1].key, functools.reduce(lambda t, k: t[k.key], path, one.router_stats)
        # What travels is none of one device's.
        if name not in ("rows", "rows_sent", "rows_sent_out", "bytes_sent", "bytes_sent_out",
                        "devices_touched", "nodes_touched", "exchange_overflow"):  # fmt: skip
            assert tiny.relative_error(values, alone) <= 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_bits_are_those_of_the_same_mesh_with_rows_in_place_of_parts(mesh):
    """Not of one device: a sum that tensor divides rounds the other way, and a value flips.

    An expert's weight gradient scales 128 of the rows that one device holds together, and a cut
    gives it other rows: that is the rounding of e4m3 itself, measured at 3.3e-2.
    """
    config = MESHES[mesh]
    uncut = dataclasses.replace(config, data=config.data * config.context, context=1)
    (wanted, rows), (got, parts) = found("fp8 mla", uncut), found("fp8 mla", MESHES[mesh])
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        limit = 5e-2 if "experts" in jax.tree_util.keystr(path) else 1e-4
        assert tiny.relative_error(a, b) <= limit, path
    for name in ("nll", "targets", "aux_loss"):
        tiny.assert_trees_close(getattr(parts, name), getattr(rows, name), 1e-5)


def test_tokens_that_travel_are_counted_as_without_a_cut():
    # Rows stay with their devices along expert: a token's home does not depend on its position.
    counts = found("mla, mtp", MESHES["expert 2 x context 2 x tensor 2"])[1].router_stats
    layer = jax.tree.map(lambda a: a.reshape(-1)[0], counts["segment_1"]["layer_0"])
    tokens = float(layer["tokens"])
    assert 0 < layer["rows_sent"] < layer["rows"] <= 2 * tokens
    assert layer["bytes_sent"] == layer["rows_sent"] * 2 * 16 * 4


@st.composite
def attentions(draw):
    """Heads, key/value heads, window, whether there are sinks, and documents of two rows."""
    kv_heads = draw(st.sampled_from([1, 2]))
    ends = [sorted(draw(st.lists(st.integers(1, LENGTH), max_size=3))) for _ in range(2)]
    segments = [[1 + sum(i >= end for end in row) for i in range(LENGTH)] for row in ends]
    padding = draw(st.integers(0, LENGTH - 1))
    segments[1][LENGTH - padding :] = [0] * padding
    return kv_heads, draw(st.sampled_from([0, 5])), draw(st.booleans()), np.array(segments)


@functools.cache
def attended(kv_heads, window, sinks, mesh, backend):
    def run(query, key, value, sink, segments, cotangent):
        mask = attention_mask(segments, LENGTH, window)
        apply = lambda query, key, value, sink: attend(
            query, key, value, mask, name="xla", sinks=sink if sinks else None, window=window
        )
        out, pull = jax.vjp(apply, query, key, value, sink)
        return out, pull(cotangent)

    return jax.jit(run)


def both_ways(case, backend="cpu"):
    """Outputs and gradients over a mesh, and on one device."""
    mesh = MeshConfig(data=2, context=4)
    kv_heads, window, sinks, segments = case
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, LENGTH, heads, 8)), jnp.float32)
    inputs = draw(4), draw(kv_heads), draw(kv_heads), jnp.arange(4.0), segments, draw(4)
    alone = attended(kv_heads, window, sinks, None, backend)(*inputs)
    with jax.set_mesh(make_mesh(mesh)):
        return attended(kv_heads, window, sinks, mesh, backend)(*inputs), alone


@settings(max_examples=20, deadline=None, derandomize=True)
@given(attentions())
def test_drawn_documents_and_windows(case):
    tiny.assert_trees_close(*both_ways(case), 1e-5)


PACKED = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], LENGTH // 4, axis=1)


def test_a_gpus_attention_is_not_told_that_cut_queries_are_causal(monkeypatch):
    told, attention = [], jax.nn.dot_product_attention

    def record(*arrays, is_causal, implementation, **options):
        told.append(is_causal)
        return attention(*arrays, is_causal=is_causal, implementation="xla", **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    import moejax.models.attend as module

    monkeypatch.setattr(module, "implementation", lambda *_: "cudnn")
    got, alone = both_ways((2, 5, False, PACKED), backend="gpu")
    # On one device it is, since the halves above the diagonal are left out only then.
    assert told == [True, False]
    tiny.assert_trees_close(got, alone, 1e-5)


def test_more_keys_than_queries_are_all_read():
    rng = np.random.default_rng(0)
    draw = lambda length, heads: jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32)
    query, key, value = draw(150, 4), draw(150, 2), draw(150, 2)
    mask = attention_mask(None, 150)
    part = causal_attention(query[:, 70:], key, value, mask[:, :, 70:])
    assert tiny.relative_error(part, causal_attention(query, key, value, mask)[:, 70:]) < 1e-5


def test_what_cannot_be_cut_is_whole():
    assert parts_of_length(8) == 1 and cut_of_tokens(4, 8) == P(None, None)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        assert parts_of_length(8) == 4 and parts_of_length(1) == parts_of_length(6) == 1
        assert cut_of_tokens(4, 8) == P(("data", "fsdp", "expert"), "context")
        assert cut_of_tokens(3, 6) == P(None, None)
        # A device has two of four rows, and a quarter of each.
        assert slots_in_reach("none", 4, 32, 5) == 2 * 5
        assert slots_in_reach("none", 4, 16, 5) == 2 * 4


@pytest.mark.parametrize("chunk", [0, 3, 100])
def test_chunks_of_a_cut_length_lose_no_position(chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 24, 4)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 7, (2, 24)), jnp.int32)
    weights = jnp.asarray(rng.random((2, 24)), jnp.float32)
    run = lambda hidden: chunked_cross_entropy_and_guess(hidden, head, targets, weights, chunk)
    both = lambda: jax.value_and_grad(run, has_aux=True)(hidden)
    (one, guess), d_one = both()
    with jax.set_mesh(make_mesh(MeshConfig(context=4))):
        (cut, guess_cut), d_cut = both()
    assert tiny.relative_error(cut, one) < 1e-6 and tiny.relative_error(d_cut, d_one) < 1e-6
    np.testing.assert_array_equal(guess, guess_cut)
