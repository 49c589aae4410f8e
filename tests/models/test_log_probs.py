"""Chunked log-probabilities and entropies against a form that builds all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.models import Transformer
from moejax.models.log_probs import token_log_probs
from moejax.models.loss import chunked_cross_entropy

ROWS, LENGTH, WIDTH, VOCAB = 2, 11, 8, 13


@pytest.fixture(scope="module")
def case():
    """Hidden states, head, targets below 10, and what log-probabilities and entropies weigh."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 10, (ROWS, LENGTH)))
    weights = normal(2, ROWS, LENGTH).at[:, 1, 6:].set(0.0)
    return normal(ROWS, LENGTH, WIDTH), normal(WIDTH, VOCAB), targets, weights


def naive(hidden, head, targets, chunk, temperature, vocab_size):
    del chunk
    logits = (hidden @ head / temperature)[..., :vocab_size]
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(function, options, hidden, head, targets, weights):
    def total(hidden, head):
        found = function(hidden, head, targets, *options)
        return jnp.sum(weights[0] * found[0] + weights[1] * found[1]), found

    return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)


# Whole, one at a time, a size that does not divide 11; a temperature; a padded vocabulary.
@pytest.mark.parametrize(
    "options", [(0, 1.0, None), (1, 1.0, VOCAB), (4, 0.7, None), (4, 1.5, 10), (64, 1.0, 10)]
)
def test_equals_the_naive_form(case, options):
    got, wanted = run(token_log_probs, options, *case), run(naive, options, *case)
    tiny.assert_trees_close(got, wanted, 2e-6)
    assert not np.any(np.asarray(got[1][0])[1, 6:])  # nothing asked of it: exactly no gradient


def test_sums_to_the_cross_entropy(case):
    hidden, head, targets, _ = case
    ones = jnp.ones(targets.shape)
    log_probs, _ = jax.jit(token_log_probs, static_argnums=(3,))(hidden, head, targets, 4)
    nll = jax.jit(chunked_cross_entropy, static_argnums=(4,))(hidden, head, targets, ones, 4)
    np.testing.assert_allclose(-jnp.sum(log_probs), nll, rtol=1e-6)


def test_uniform_logits(case):
    _, head, targets, _ = case
    hidden = jnp.zeros((ROWS, LENGTH, WIDTH))
    log_probs, entropy = token_log_probs(hidden, head, targets, 0, 1.0, 10)
    np.testing.assert_allclose(log_probs, np.full((ROWS, LENGTH), -np.log(10)), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.full((ROWS, LENGTH), np.log(10)), rtol=1e-6)


def test_logits_never_exist_at_once(case):
    hidden, head, targets, weights = case

    def total(hidden, head):
        found = token_log_probs(hidden, head, targets, 4)
        return jnp.sum(weights * jnp.stack(found))

    text = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, head))
    assert f"f32[{ROWS},4,{VOCAB}]" in text
    for length in (LENGTH, 12):
        assert f"[{ROWS},{length},{VOCAB}]" not in text
    assert f"[3,{ROWS},4,{VOCAB}]" not in text  # nor saved, chunk by chunk


def test_bfloat16_is_close(case):
    hidden, *rest = case
    options = (4, 1.0, None)
    exact = run(naive, options, hidden, *rest)
    (_, found), gradients = run(token_log_probs, options, hidden.astype(jnp.bfloat16), *rest)
    assert found[0].dtype == found[1].dtype == gradients[1].dtype == jnp.float32
    assert gradients[0].dtype == jnp.bfloat16
    for got, wanted in zip((*found, *gradients), (*exact[0][1], *exact[1]), strict=True):
        assert tiny.relative_error(got, wanted) < 0.03


def test_of_a_model_they_are_those_of_its_logits():
    config = tiny.moe_config(dispatch="dense_loop", loss_chunk=3, num_layers=1, first_k_dense=0)
    variables, batch = tiny.variables(config), jax.tree.map(lambda a: a[0], tiny.batch())
    inputs = batch.tokens, batch.segment_ids, batch.positions
    model = Transformer(config)

    @jax.jit
    def log_probs(variables, targets):
        return model.apply(
            variables, inputs[0], targets, *inputs[1:], temperature=0.8,
            method=Transformer.log_probs,
        )  # fmt: skip

    got, output = log_probs(variables, batch.targets), tiny.forward(config)(variables, *inputs)
    wanted = jax.nn.log_softmax(output.logits / 0.8, axis=-1)
    chosen = jnp.take_along_axis(wanted, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(got.log_probs, chosen, rtol=1e-5, atol=1e-5)
    entropy = -jnp.sum(jnp.exp(wanted) * wanted, axis=-1)
    np.testing.assert_allclose(got.entropy, entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.aux_loss, output.aux_loss, rtol=1e-6)
    tiny.assert_trees_close(got.router_stats, output.router_stats, 1e-6)
