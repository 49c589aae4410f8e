"""Sampling: greedy rows are the arg-max of the full pass, ids stay inside the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.models.sampling import generate, sample

LENGTH, PROMPT = 12, 4


class Letters:
    """A tokenizer of 20 letters; id 0 separates documents."""

    separator = 0
    vocab_size = 21

    def encode(self, text):
        return np.array([ord(letter) - ord("a") + 1 for letter in text], np.int32)

    def decode(self, ids):
        assert all(0 < i < self.vocab_size for i in ids)
        return "".join(chr(ord("a") + i - 1) for i in ids)


@pytest.fixture(scope="module")
def model():
    config = tiny.moe_config()
    return config, tiny.variables(config)


def run(model, prompts, lengths, temperature, vocab=21, seed=0):
    config, variables = model
    return np.asarray(
        sample(
            config, variables, jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32),
            jax.random.key(seed), length=LENGTH, temperature=jnp.float32(temperature),
            vocab_size=jnp.int32(vocab),
        )
    )  # fmt: skip


PROMPTS = [[0, 3, 1, 4], [0, 15, 0, 0]]


def test_greedy_is_the_arg_max_of_the_full_pass(model):
    config, variables = model
    lengths = [4, 2]
    rows = run(model, PROMPTS, lengths, 0.0)
    # Called as in test_transformer.py, so that the program is compiled once.
    segments, positions = jnp.ones((2, LENGTH), jnp.int32), jnp.tile(jnp.arange(LENGTH), (2, 1))
    logits = np.asarray(tiny.forward(config)(variables, rows, segments, positions).logits)
    following = logits[:, :, :21].argmax(axis=-1)
    for row, length, prompt, best in zip(rows, lengths, PROMPTS, following, strict=True):
        np.testing.assert_array_equal(row[:length], prompt[:length])
        np.testing.assert_array_equal(row[length:], best[length - 1 : -1])


def test_ids_beyond_the_vocabulary_are_never_sampled(model):
    rows = run(model, PROMPTS, [1, 1], 50.0, vocab=3)
    assert rows[:, 1:].max() < 3
    assert set(rows[:, 1:].reshape(-1)) == {0, 1, 2}


def test_noise_follows_the_key(model):
    first = run(model, PROMPTS, [1, 1], 3.0)
    np.testing.assert_array_equal(run(model, PROMPTS, [1, 1], 3.0), first)
    assert np.any(run(model, PROMPTS, [1, 1], 3.0, seed=1) != first)


def test_generate_continues_a_text(model):
    # Separator and "cad" are a prompt of 4 tokens, as above; one program serves all tests.
    rows = run(model, [[0, 3, 1, 4]] * 2, [4, 4], 0.0)
    wanted = rows[0, PROMPT:].tolist()
    end = wanted.index(0) if 0 in wanted else len(wanted)
    text = "cad" + Letters().decode(wanted[:end])
    config, variables = model
    got = generate(
        config, variables, Letters(), "cad", tokens=LENGTH - PROMPT, temperature=0.0, count=2
    )
    assert got == [text, text]
