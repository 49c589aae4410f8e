"""Masks by hand, and grouped heads. Causality by gradient is in test_transformer.py."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from moejax.models.attend import implementation
from moejax.models.attention import GroupedQueryAttention, attention_mask


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


def test_auto_is_xla_on_a_cpu():
    assert implementation("auto", jnp.zeros(1, jnp.bfloat16)) == "xla"
    assert implementation("cudnn", jnp.zeros(1)) == "cudnn"
