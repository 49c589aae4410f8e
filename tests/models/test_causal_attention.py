"""Blocks of queries against jax.nn's attention: values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.models.attention import attention_mask
from moejax.models.causal_attention import block_ranges, causal_attention


def _inputs(length: int, heads: int, kv_heads: int, dtype=jnp.float32):
    """Query, key, value and the output's cotangent, two rows."""
    rng = np.random.default_rng(length + heads + kv_heads)
    draw = lambda count: jnp.asarray(rng.normal(size=(2, length, count, 8)), dtype)
    return (draw(heads), draw(kv_heads), draw(kv_heads)), draw(heads)


def _segments(length: int):
    """A row of three documents and padding, and one of a single document."""
    rows = np.ones((2, length), np.int32)
    rows[0, length // 5 :] = 2
    rows[0, length // 2 :] = 3
    rows[0, length - length // 4 :] = 0
    return jnp.asarray(rows)


def _reference(query, key, value, mask, scale=None):
    attend = jax.nn.dot_product_attention
    return attend(query, key, value, mask=mask, scale=scale, implementation="xla")


def _values_and_gradients(attend, arrays, cotangent, mask):
    def run(arrays, cotangent, mask):
        out, gradients = jax.vjp(lambda *arrays: attend(*arrays, mask), *arrays)
        return out, *gradients(cotangent)

    return jax.jit(run)(arrays, cotangent, mask)


def test_blocks_cover_the_row():
    for length in (1, 64, 65, 150, 512, 1000):
        ranges = block_ranges(length)
        assert [i for start, end in ranges for i in range(start, end)] == list(range(length))
        assert len(ranges) <= 8


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads"), [(150, 4, 2), (128, 4, 4), (70, 3, 1), (5, 2, 2)]
)
def test_values_and_gradients_are_those_of_jax(length, heads, kv_heads, packed):
    arrays, cotangent = _inputs(length, heads, kv_heads)
    mask = attention_mask(_segments(length) if packed else None, length)
    got = _values_and_gradients(causal_attention, arrays, cotangent, mask)
    wanted = _values_and_gradients(_reference, arrays, cotangent, mask)
    for name, ours, theirs in zip(("out", "query", "key", "value"), got, wanted, strict=True):
        assert tiny.relative_error(ours, theirs) < 1e-5, name


def test_bfloat16_has_a_float32_softmax():
    # Against float32 on the same rounded inputs: what is left is the rounding of the products.
    arrays, cotangent = _inputs(150, 4, 2, jnp.bfloat16)
    mask = attention_mask(_segments(150), 150)
    got = _values_and_gradients(causal_attention, arrays, cotangent, mask)
    wide = [array.astype(jnp.float32) for array in arrays]
    wanted = _values_and_gradients(_reference, wide, cotangent.astype(jnp.float32), mask)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert tiny.relative_error(ours.astype(jnp.float32), theirs) < 1e-2


def test_rows_far_above_one_another_do_not_overflow():
    arrays, cotangent = _inputs(70, 2, 2)
    arrays = (arrays[0] * 100, *arrays[1:])
    mask = attention_mask(None, 70)
    for array in _values_and_gradients(causal_attention, arrays, cotangent, mask):
        assert bool(jnp.all(jnp.isfinite(array)))


@pytest.mark.parametrize("window", [1, 20, 100])
def test_a_window_is_jaxs_local_window(window):
    # Blocks of 64: the second and third leave out keys that they cannot see.
    arrays, cotangent = _inputs(150, 4, 2)
    mask = attention_mask(_segments(150), 150, window)
    local = lambda query, key, value, mask: jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, local_window_size=(window - 1, 0),
        implementation="xla",
    )  # fmt: skip
    ours = lambda *arrays: causal_attention(*arrays, None, None, window)
    got = _values_and_gradients(ours, arrays, cotangent, mask)
    wanted = _values_and_gradients(local, arrays, cotangent, attention_mask(_segments(150), 150))
    for ours, theirs in zip(got, wanted, strict=True):
        assert tiny.relative_error(ours, theirs) < 1e-5


def test_keys_out_of_the_window_are_not_read():
    arrays, _ = _inputs(150, 2, 2)
    query, key, value = arrays
    run = jax.jit(
        lambda *arrays: causal_attention(*arrays, attention_mask(None, 150), None, None, 8)
    )
    got = run(query, key.at[:, :50].set(jnp.nan), value.at[:, :50].set(jnp.nan))
    # Queries from 64 on are in blocks that start at key 57 or later.
    assert bool(jnp.all(jnp.isfinite(got[:, 64:]))) and not bool(jnp.all(jnp.isfinite(got)))


def test_values_of_another_width_and_a_scale():
    # Values of width 3 beside keys of 8: jax.nn's attention takes them padded.
    (query, key, value), cotangent = _inputs(150, 4, 2)
    arrays, cotangent = (query, key, value[..., :3]), cotangent[..., :3]
    mask = attention_mask(_segments(150), 150)
    padded = lambda query, key, value, mask: _reference(
        query, key, jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, 5))), mask, 0.7
    )[..., :3]
    ours = lambda *arrays: causal_attention(*arrays, None, 0.7)
    got = _values_and_gradients(ours, arrays, cotangent, mask)
    wanted = _values_and_gradients(padded, arrays, cotangent, mask)
    for ours, theirs in zip(got, wanted, strict=True):
        assert tiny.relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("window", [0, 20])
def test_sinks_are_a_key_more_without_a_value(window):
    # jax.nn's attention over one key more: every query sees it, its bias is the sink.
    arrays, cotangent = _inputs(150, 4, 2)
    sinks = jnp.array([-1.0, 0.5, 30.0, 2.0])
    mask = attention_mask(_segments(150), 150, window)

    def longer(query, key, value, sinks, mask):
        more = lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
        bias = jnp.broadcast_to(sinks[None, :, None, None], (1, 4, 150, 1))
        bias = jnp.concatenate([jnp.zeros((1, 4, 150, 150)), bias], axis=-1)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)
        return jax.nn.dot_product_attention(
            query, more(key), more(value), bias, mask, implementation="xla"
        )

    def ours(query, key, value, sinks, mask):
        return causal_attention(query, key, value, mask, sinks, None, window)

    got = _values_and_gradients(ours, (*arrays, sinks), cotangent, mask)
    wanted = _values_and_gradients(longer, (*arrays, sinks), cotangent, mask)
    for name, a, b in zip(("out", "query", "key", "value", "sinks"), got, wanted, strict=True):
        assert tiny.relative_error(a, b) < 1e-5, name
