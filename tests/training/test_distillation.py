"""Distillation on answers and on distributions, against forms that build all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.reasoning.losses import response_mask
from moejax.training.distillation import (
    DistillConfig,
    answer_weights,
    distillation_loss,
    top_k_distillation_loss,
)

ROWS, LENGTH, WIDTH, TEACHER, VOCAB = 2, 7, 6, 9, 11


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (ROWS, LENGTH, WIDTH), (WIDTH, VOCAB), (ROWS, LENGTH, TEACHER), (TEACHER, VOCAB)
    weights = jnp.asarray(np.arange(LENGTH)[None] < [[7], [4]], jnp.float32)
    return *(jnp.asarray(0.6 * rng.normal(size=s), jnp.float32) for s in shapes), weights


def naive(config, hidden, head, teacher_hidden, teacher_head, weights):
    scale = lambda logits: jax.nn.log_softmax(logits / config.temperature, axis=-1)
    student, teacher = scale(hidden @ head), scale(teacher_hidden @ teacher_head)
    p, q = (teacher, student) if config.divergence == "forward" else (student, teacher)
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return config.temperature**2 * jnp.sum(weights * kl)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(function, config, chunk, *inputs):
    loss = lambda *inputs: 3 * function(config, *inputs, *([] if chunk is None else [chunk]))
    return jax.value_and_grad(loss, (0, 1))(*inputs)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature, chunk", [(1.0, 0), (2.0, 3)])
def test_equals_the_naive_divergence(divergence, temperature, chunk):
    config, inputs = DistillConfig(divergence, temperature), draw()
    got = run(distillation_loss, config, chunk, *inputs)
    tiny.assert_trees_close(got, run(naive, config, None, *inputs), 2e-6)
    assert not np.any(np.asarray(got[1][0])[1, 4:])  # padding


def test_neither_model_s_logits_exist_at_once():
    loss = functools.partial(distillation_loss, DistillConfig(), chunk=3)
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*draw()))
    assert f"f32[{ROWS},3,{VOCAB}]" in text
    for length in (LENGTH, 9):  # with and without the padding to whole chunks
        assert f"f32[{ROWS},{length},{VOCAB}]" not in text


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["forward", "reverse"]))
def test_never_negative_and_zero_for_the_teacher_itself(seed, divergence):
    hidden, head, teacher_hidden, teacher_head, weights = draw(seed)
    config = DistillConfig(divergence)
    value = lambda *inputs: run(distillation_loss, config, 0, *inputs, weights)[0]
    assert value(hidden, head, teacher_hidden, teacher_head) > 0
    same = run(distillation_loss, config, 0, teacher_hidden, teacher_head, *draw(seed)[2:])
    np.testing.assert_allclose(same[0], 0, atol=1e-5)
    np.testing.assert_allclose(same[1][1], np.zeros_like(teacher_head), atol=1e-5)


def top_k(count, temperature, hidden, head, teacher_hidden, teacher_head, weights):
    logits, tokens = jax.lax.top_k(teacher_hidden @ teacher_head, count)
    return top_k_distillation_loss(hidden, head, tokens, logits, weights, 3, temperature)


def test_all_of_the_teacher_s_logits_are_the_whole_divergence():
    inputs = draw()
    wanted = run(distillation_loss, DistillConfig(temperature=2.0), 3, *inputs)
    loss = jax.value_and_grad(functools.partial(top_k, VOCAB, 2.0), (0, 1))
    value, gradients = jax.jit(loss)(*inputs)
    tiny.assert_trees_close((3 * value, jax.tree.map(lambda g: 3 * g, gradients)), wanted, 2e-6)


def test_one_teacher_logit_is_cross_entropy():
    hidden, head, teacher_hidden, teacher_head, weights = draw()
    best = jnp.argmax(teacher_hidden @ teacher_head, axis=-1)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), best[..., None], -1)[..., 0]
    got = top_k(1, 1.0, hidden, head, teacher_hidden, teacher_head, weights)
    np.testing.assert_allclose(got, jnp.sum(weights * nll), rtol=1e-5)


def test_answer_weights_in_a_packed_row():
    #                 question, answer | question, answer | padding
    answers = jnp.array([[0, 0, 1, 1, 0, 1, 1, 0]], bool)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    assert answer_weights(answers, segments).tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    # A document that starts with an answer's token is not the target of the one before.
    answers = jnp.array([[0, 1, 1, 1]], bool)
    assert answer_weights(answers, jnp.array([[1, 1, 2, 2]])).tolist() == [[1, 0, 1, 0]]


def test_answer_weights_are_the_response_mask_of_unpacked_rows():
    prompts, lengths, width = jnp.array([2, 1, 3]), jnp.array([4, 6, 3]), 6
    token = jnp.arange(width)[None]
    answers = (token >= prompts[:, None]) & (token < lengths[:, None])
    got, wanted = answer_weights(answers), response_mask(prompts, lengths, width)
    assert np.array_equal(got, wanted)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"distill\.temperature"):
        DistillConfig(temperature=0.0)
