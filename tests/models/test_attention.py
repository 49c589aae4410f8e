"""Masks by hand, grouped heads, the implementations of attention, and cached decoding.

Against Hugging Face's modules: test_attention_parity.py. Causality by gradient:
test_transformer.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.models import AttentionConfig, RopeConfig, Transformer, init_cache
from moejax.models.attend import attend, implementation
from moejax.models.attention import GroupedQueryAttention, attention_mask, cached_mask


def test_documents_see_their_own_past():
    # Documents 1 1 2 2 and padding 0.
    mask = attention_mask(jnp.array([[1, 1, 2, 2, 0]]), 5)[0, 0]
    wanted = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(mask, np.array(wanted, bool))
    np.testing.assert_array_equal(attention_mask(None, 3)[0, 0], np.tri(3, dtype=bool))


def test_heads_share_keys_in_groups():
    # NumPy attention with every query head's own key/value head looked up: heads 0, 1 use 0.
    config = tiny.dense_config()
    x = jax.random.normal(jax.random.key(0), (1, 5, 16))
    mask = attention_mask(None, 5)
    positions = jnp.zeros((1, 5), jnp.int32)  # no rotation
    layer = GroupedQueryAttention(config)
    variables = tiny.draw(jax.eval_shape(layer.init, jax.random.key(1), x, positions, mask))
    got, cache = jax.jit(layer.apply)(variables, x, positions, mask)
    assert cache is None
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    project = lambda name: np.einsum("bsd,dhk->bhsk", x, params[name]["kernel"])
    query, key, value = project("query"), project("key"), project("value")
    out = np.zeros((1, 5, 16))
    for head in range(4):
        scores = query[:, head] @ key[:, head // 2].transpose(0, 2, 1) / 4**0.5
        weights = np.where(np.tri(5), np.exp(scores), 0)
        weights /= weights.sum(-1, keepdims=True)
        out += weights @ value[:, head // 2] @ params["out"]["kernel"][head]
    assert tiny.relative_error(got, out) < 1e-5


def test_a_window_includes_the_query_and_ends_at_its_document():
    # A window of 2 in documents 1 1 1 2 2: the token itself and the one before.
    mask = attention_mask(jnp.array([[1, 1, 1, 2, 2]]), 5, window=2)[0, 0]
    wanted = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(mask, np.array(wanted, bool))
    # Two queries after three cached positions, with room for six.
    cached = cached_mask(jnp.array([3]), 2, 6, window=2)[0, 0]
    wanted = [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
    np.testing.assert_array_equal(cached, np.array(wanted, bool))


def test_auto_is_xla_on_a_cpu_and_with_sinks(monkeypatch):
    query = jnp.zeros((1, 2, 4, 64), jnp.bfloat16)
    assert implementation("auto", query) == "xla"
    assert implementation("cudnn", query) == "cudnn"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert implementation("auto", query) == "cudnn"
    assert implementation("auto", query, jnp.zeros(4)) == "xla"
    assert implementation("auto", jnp.zeros((1, 2, 4, 192), jnp.bfloat16)) == "xla"


@pytest.mark.parametrize("sinks", [False, True])
def test_xlas_attention_is_the_cpus(sinks):
    # Values of 3 channels beside keys of 8, a scale, a window: what GPUs run, run here.
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    arrays = (draw(2, 12, 4, 8), draw(2, 12, 2, 8), draw(2, 12, 2, 3))
    arrays += (draw(4),) if sinks else (None,)
    cotangent, mask = draw(2, 12, 4, 3), attention_mask(None, 12, 5)

    def run(whole, query, key, value, sinks):
        return attend(
            query, key, value, mask, name="auto", scale=0.6, sinks=sinks, window=5, whole=whole
        )

    @jax.jit
    def both(arrays, cotangent):
        found = []
        for whole in (True, False):
            out, backward = jax.vjp(lambda *a, whole=whole: run(whole, *a), *arrays)
            found.append((out, backward(cotangent)))
        return found

    cpu, xla = both(arrays, cotangent)
    tiny.assert_trees_close(cpu, xla, 1e-5)


YARN = RopeConfig(scaling="yarn", factor=40.0, original_length=32, beta_fast=4.0, mscale=0.5)
MLA = dict(kind="mla", kv_lora_rank=8, nope_head_dim=6, rope_head_dim=4, v_head_dim=5)
KINDS = {
    "mla": AttentionConfig(4, **MLA, q_lora_rank=12, bias="all"),
    "mla, full query, yarn": AttentionConfig(
        4, **MLA, rope=RopeConfig(scaling="yarn", factor=40.0, original_length=32, mscale_all_dim=1)
    ),
    "window, sinks, biases": AttentionConfig(
        4, 2, window=3, sinks=True, bias="all", rope=YARN
    ),
    "window, norms, partial": AttentionConfig(
        4, 2, window=4, qk_norm="head", rope=RopeConfig(fraction=0.5)
    ),
}  # fmt: skip
LENGTH = 10


def model(kind):
    """One layer, or one with a window and one without; random weights and tokens of two rows."""
    attention = KINDS[kind]
    kinds = ("dense_window", "dense") if attention.window else ("dense",)
    config = tiny.dense_config(
        attention=attention, num_layers=len(kinds), segments=((kinds, 1),), d_ff=8
    )
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, LENGTH))
    return config, tiny.variables(config), jnp.asarray(tokens, jnp.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_the_full_pass(kind):
    # In chunks of 4 and 2, then token by token; the cache has room for more than the row.
    config, variables, tokens = model(kind)
    full = tiny.forward(config)(variables, tokens).logits
    step = jax.jit(lambda tokens, cache: Transformer(config).apply(variables, tokens, cache=cache))
    cache, start = init_cache(config, 2, LENGTH + 3), 0
    for count in (4, 2, 1, 1, 1, 1):
        out = step(tokens[:, start : start + count], cache)
        error = tiny.relative_error(out.logits, full[:, start : start + count])
        assert error < 1e-5, (start, error)
        cache, start = out.cache, start + count
    np.testing.assert_array_equal(cache["index"], [start] * 2)
    assert start == LENGTH


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_separate_rows(kind):
    # Documents of 6 and 4 tokens in one row, and each in a row of its own.
    config, variables, tokens = model(kind)
    segments = jnp.array([[1] * 6 + [2] * 4] * 2)
    positions = jnp.array([[*range(6), *range(4)]] * 2)
    packed = tiny.forward(config)(variables, tokens, segments, positions).logits
    alone = jnp.roll(tokens, -6, axis=1)
    first = tiny.forward(config)(variables, tokens).logits[:, :6]
    second = tiny.forward(config)(variables, alone).logits[:, :4]
    assert tiny.relative_error(packed, jnp.concatenate([first, second], axis=1)) < 1e-5


def test_a_window_layer_sees_its_window_only():
    # The gradient of one position's output is zero before its window, and nowhere in it.
    config = tiny.dense_config(attention=AttentionConfig(4, 2, window=3))
    layer, mask = GroupedQueryAttention(config, 3), attention_mask(None, 8, 3)
    x, positions = jax.random.normal(jax.random.key(0), (1, 8, 16)), jnp.arange(8)[None]
    variables = tiny.draw(jax.eval_shape(layer.init, jax.random.key(1), x, positions, mask))
    at = lambda x: jnp.sum(layer.apply(variables, x, positions, mask)[0][0, 5])
    reached = np.any(np.asarray(jax.jit(jax.grad(at))(x)[0]) != 0, axis=-1)
    np.testing.assert_array_equal(reached, [0, 0, 0, 1, 1, 1, 0, 0])


@pytest.mark.parametrize("kind", ["moe_window", "moe"])
def test_the_kind_of_layer_says_whether_there_is_a_window(kind):
    # One layer with experts, window 3: the first token reaches the first three positions only.
    config = tiny.moe_config(
        num_layers=1, segments=(((kind,), 1),), attention=AttentionConfig(4, 2, window=3)
    )
    variables = tiny.variables(config)
    assert "moe" in variables["params"]["segment_0"]["layer_0"]
    tokens = jnp.arange(8)[None]
    other = tokens.at[0, 0].set(20)
    apply = tiny.forward(config)
    moved = apply(variables, tokens).logits[0] != apply(variables, other).logits[0]
    reached = [1, 1, 1, 0, 0, 0, 0, 0] if kind == "moe_window" else [1] * 8
    np.testing.assert_array_equal(np.any(np.asarray(moved), axis=-1), reached)
