"""Latent attention: what decoding builds and keeps, and the same on one device and on eight.

Against Hugging Face's modules: test_attention_parity.py. Decoding: test_attention.py.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.models import AttentionConfig, RopeConfig, Transformer, init_cache
from moejax.moe.exchange import BATCH_AXES
from moejax.parallel import MeshConfig, make_mesh
from moejax.training.state import make_init
from moejax.training.step import make_train_step

# Sizes that no other axis has: 7 channels still, values of 11, 23 positions.
NOPE, VALUE, ROOM = 7, 11, 23
CONFIG = tiny.dense_config(
    num_layers=1,
    attention=AttentionConfig(
        4, kind="mla", q_lora_rank=12, kv_lora_rank=8, nope_head_dim=NOPE, rope_head_dim=6,
        v_head_dim=VALUE,
    ),
)  # fmt: skip


def shapes_of(run, *arguments):
    """The shapes of all arrays in a program, before XLA changes it."""
    program = jax.jit(run).lower(*arguments).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", program)
    return {tuple(map(int, shape[:-1].split("x"))) for shape in shapes}


def test_decoding_makes_no_key_and_no_value_of_a_cached_token():
    variables = jax.eval_shape(lambda: tiny.variables(CONFIG))
    apply = lambda variables, tokens, cache: Transformer(CONFIG).apply(
        variables, tokens, cache=cache
    )
    token = jnp.zeros((2, 1), jnp.int32)
    cached = shapes_of(apply, variables, token, init_cache(CONFIG, 2, ROOM))
    widths = {NOPE, VALUE, NOPE + VALUE, NOPE + 6}
    made = lambda shapes: {shape for shape in shapes if ROOM in shape and widths & set(shape)}
    assert not made(cached)
    assert (2, ROOM, 8 + 6) in cached  # the cache itself
    # Without a cache keys and values are made, so the look above can find them.
    whole = shapes_of(apply, variables, jnp.zeros((2, ROOM), jnp.int32), None)
    assert {(2, ROOM, 4, NOPE), (2, ROOM, 4, VALUE)} <= made(whole)


def test_the_cache_keeps_the_latent_and_the_shared_key():
    # DeepSeek-V3's: 512 + 64 numbers a token and layer.
    attention = AttentionConfig(
        128, kind="mla", q_lora_rank=1536, kv_lora_rank=512, nope_head_dim=128, rope_head_dim=64,
        v_head_dim=128,
    )  # fmt: skip
    config = tiny.dense_config(attention=attention, dtype="bfloat16")
    cache = jax.eval_shape(lambda: init_cache(config, 1, 100))
    entry = cache["segment_0"]["layer_0"].entry
    assert entry.shape == (2, 1, 100, 576) and entry.dtype == jnp.bfloat16
    assert cache["segment_0"]["layer_0"].length == 100


@pytest.mark.parametrize("q_rank", [0, 12])
def test_the_parameter_tree(q_rank):
    attention = AttentionConfig(
        4, kind="mla", q_lora_rank=q_rank, kv_lora_rank=8, nope_head_dim=6, rope_head_dim=4,
        v_head_dim=5, bias="all",
    )  # fmt: skip
    tree = tiny.shapes(tiny.dense_config(attention=attention))["params"]
    tree = nn.meta.unbox(tree)["segment_0"]["layer_0"]["attention"]
    found = {
        "/".join(part.key for part in path): leaf.shape[1:]
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    query = {"query/kernel": (16, 4, 10)}
    if q_rank:
        query = {
            "query_down/kernel": (16, 12), "query_down/bias": (12,), "query_norm/scale": (12,),
            "query_up/kernel": (12, 4, 10),
        }  # fmt: skip
    assert found == query | {
        "kv_down/kernel": (16, 12), "kv_down/bias": (12,), "kv_norm/scale": (8,),
        "kv_up/kernel": (8, 4, 11), "out/kernel": (4, 5, 16), "out/bias": (16,),
    }  # fmt: skip


SMALL = tiny.dense_config(
    num_layers=1, d_ff=16,
    attention=AttentionConfig(
        4, kind="mla", q_lora_rank=12, kv_lora_rank=8, nope_head_dim=6, rope_head_dim=4,
        v_head_dim=5, rope=RopeConfig(scaling="yarn", factor=40.0, original_length=32),
    ),
)  # fmt: skip
MESHES = {
    "one device": MeshConfig(),
    "fsdp 4 x tensor 2": MeshConfig(fsdp=4, tensor=2),
    "data 2 x tensor 4": MeshConfig(data=2, tensor=4),
}
# Plain gradient descent that also keeps the gradients.
OPTIMIZER = optax.chain(optax.trace(decay=0.0), optax.scale(-0.1))


@functools.cache
def run(mesh):
    """The loss and the gradients of a step of 8 rows."""
    devices = make_mesh(MESHES[mesh])
    _, abstract = make_init(SMALL, OPTIMIZER, devices)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    values = zeros.replace(params=tiny.variables(SMALL)["params"])
    state = jax.tree.map(lambda v, leaf: jax.device_put(v, leaf.sharding), values, abstract)
    rows = NamedSharding(devices, P(None, BATCH_AXES, None))
    batch = jax.tree.map(lambda leaf: jax.device_put(leaf, rows), tiny.batch())
    step = jax.jit(make_train_step(SMALL, OPTIMIZER, optax.constant_schedule(0.1)))
    with jax.set_mesh(devices):
        state, metrics = step(state, batch)
    return float(metrics.loss), jax.device_get(state.opt_state[0].trace)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp 4 x tensor 2", "data 2 x tensor 4"])
def test_eight_devices_give_what_one_gives(mesh):
    loss, gradients = run(mesh)
    wanted, theirs = run("one device")
    assert loss == pytest.approx(wanted, rel=1e-5)
    tiny.assert_trees_close(gradients, theirs, 1e-4)


def test_up_projections_are_cut_by_fsdp_and_heads_by_tensor():
    _, abstract = make_init(SMALL, OPTIMIZER, make_mesh(MESHES["fsdp 4 x tensor 2"]))
    attention = abstract.params["segment_0"]["layer_0"]["attention"]
    cut = lambda name: attention[name]["kernel"].sharding.spec
    assert cut("kv_up") == cut("query_up") == P(None, "fsdp", "tensor", None)
    assert cut("kv_down") == cut("query_down") == P(None, "fsdp", None)
    assert cut("out") == P(None, "tensor", None, "fsdp")
