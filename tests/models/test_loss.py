"""The chunked loss against one that builds all logits, in value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.models.loss import chunked_cross_entropy

ROWS, LENGTH, WIDTH, VOCAB = 2, 11, 8, 13


@pytest.fixture(scope="module")
def case():
    """Hidden states, head, targets and weights; a naive loss with gradients, times 3."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)))
    weights = jnp.asarray(np.arange(LENGTH)[None] < [[11], [6]], jnp.float32)

    def naive(hidden, head):
        chances = jax.nn.log_softmax(hidden @ head, axis=-1)
        return -3 * jnp.sum(weights * jnp.take_along_axis(chances, targets[..., None], -1)[..., 0])

    wanted = jax.jit(jax.value_and_grad(naive, (0, 1)))(hidden, head)
    return hidden, head, targets, weights, wanted


def run(chunk, hidden, head, targets, weights):
    loss = lambda hidden, head: 3 * chunked_cross_entropy(hidden, head, targets, weights, chunk)
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)


# Whole, one position at a time, a size that does not divide 11, and one beyond the row.
@pytest.mark.parametrize("chunk", [0, 1, 4, 64])
def test_equals_the_naive_loss(case, chunk):
    *inputs, wanted = case
    tiny.assert_trees_close(run(chunk, *inputs), wanted, 1e-6)


def test_the_undifferentiated_loss_is_the_same(case):
    hidden, head, targets, weights, (value, _) = case
    got = jax.jit(functools.partial(chunked_cross_entropy, chunk=4))(hidden, head, targets, weights)
    np.testing.assert_allclose(3 * got, value, rtol=1e-6)


def test_padding_has_exactly_no_gradient(case):
    *inputs, _ = case
    to_hidden = run(4, *inputs)[1][0]
    assert not np.any(np.asarray(to_hidden)[1, 6:])
    assert np.all(np.any(np.asarray(to_hidden)[1, :6], axis=-1))


def test_uniform_logits_cost_log_v(case):
    _, head, targets, weights, _ = case
    loss = chunked_cross_entropy(jnp.zeros((ROWS, LENGTH, WIDTH)), head, targets, weights, 0)
    np.testing.assert_allclose(loss, 17 * np.log(VOCAB), rtol=1e-6)


def test_logits_never_exist_at_once(case):
    hidden, head, targets, weights, _ = case
    program = jax.make_jaxpr(functools.partial(chunked_cross_entropy, chunk=4))
    text = str(program(hidden, head, targets, weights))
    assert f"f32[{ROWS},4,{VOCAB}]" in text
    assert f"f32[{ROWS},{LENGTH},{VOCAB}]" not in text
    assert f"f32[{ROWS},12,{VOCAB}]" not in text


def test_bfloat16_is_close(case):
    hidden, head, targets, weights, wanted = case
    value, gradients = run(4, hidden.astype(jnp.bfloat16), head, targets, weights)
    assert value.dtype == gradients[1].dtype == jnp.float32
    assert gradients[0].dtype == jnp.bfloat16
    for got, exact in zip((value, *gradients), (wanted[0], *wanted[1]), strict=True):
        assert tiny.relative_error(got, exact) < 0.02
