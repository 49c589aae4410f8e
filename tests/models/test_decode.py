"""Sampling against the training path: log-probabilities, experts, the likeliest tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.models import AttentionConfig, RopeConfig, Transformer
from moejax.models.decode import SamplingConfig, sample, sample_program

VOCAB, MOST, TEMPERATURE = 21, 8, 0.7
PROMPTS = np.array([[0, 3, 1, 4], [0, 15, 9, 9], [7, 9, 9, 9]])
LENGTHS = np.array([4, 2, 1])
SEEDS = np.array([5, 6, 7], np.uint32)
WINDOWS = AttentionConfig(4, 2, window=3, sinks=True, bias="all")
LATENT = AttentionConfig(
    4, kind="mla", q_lora_rank=12, kv_lora_rank=8, nope_head_dim=6, rope_head_dim=4, v_head_dim=5,
    rope=RopeConfig(scaling="yarn", factor=40.0, original_length=32, mscale_all_dim=1),
)  # fmt: skip
GROUPS = dict(num_groups=4, groups_kept=2)
KINDS = {
    # Layers without a window between those with one, whose ring of 3 is gone round thrice.
    "window, sinks, groups": tiny.moe_config(
        options=GROUPS, attention=WINDOWS, num_layers=4,
        segments=((("dense_window",), 1), (("moe", "moe_window", "moe"), 1)),
    ),
    "mla, groups": tiny.moe_config(options=GROUPS, attention=LATENT),
    "gqa, top_k": tiny.moe_config("top_k", attention=AttentionConfig(4, 2, qk_norm="head")),
    "dense": tiny.dense_config(num_layers=1),
}  # fmt: skip


@functools.cache
def variables(kind):
    return tiny.variables(KINDS[kind])


def run(kind, prompts=PROMPTS, lengths=LENGTHS, seeds=SEEDS, stops=(), experts=True, **options):
    config = KINDS[kind]
    options = SamplingConfig(**{"max_tokens": MOST, **options})
    return jax.device_get(sample(
        config, variables(kind), prompts, lengths, seeds, options=options, stop_ids=stops,
        vocab_size=VOCAB, keep_experts=experts,
    ))  # fmt: skip


@functools.cache
def training(kind):
    """Log-probabilities of the text itself and the experts it is sent to, without a cache."""

    @jax.jit
    def score(variables, tokens, segment_ids):
        model, targets = Transformer(KINDS[kind]), jnp.roll(tokens, -1, axis=1)
        return model.apply(
            variables, tokens, targets, segment_ids, temperature=TEMPERATURE, vocab_size=VOCAB,
            method=Transformer.log_probs, mutable=["router_choice"],
        )  # fmt: skip

    return lambda *inputs: jax.device_get(score(variables(kind), *inputs))


slow_but_first = [
    kind if i == 0 else pytest.param(kind, marks=pytest.mark.slow) for i, kind in enumerate(KINDS)
]


def segments(got, short=0):
    """1 where a row's tokens are, without the last ``short`` of them."""
    length = got.tokens.shape[1]
    return (np.arange(length)[None] < got.lengths[:, None] - short).astype(np.int32)


def completion(got):
    """True at positions whose next token was sampled."""
    at = np.arange(got.tokens.shape[1])[None]
    return (at >= got.prompt_lengths[:, None] - 1) & (at < got.lengths[:, None] - 1)


@pytest.mark.parametrize("kind", slow_but_first)
def test_log_probs_and_experts_are_those_of_training(kind):
    got = run(kind, temperature=TEMPERATURE, stops=(4, 11))
    assert got.tokens.shape == (3, 4 + MOST) and got.tokens.max() < VOCAB
    assert got.finished.any() and len(set(got.lengths - LENGTHS)) > 1  # rows end apart
    out, kept = training(kind)(got.tokens, segments(got))
    inside = completion(got)
    np.testing.assert_allclose(got.log_probs[inside], out.log_probs[inside], atol=1e-5, rtol=0)
    assert not got.log_probs[~inside].any() and got.log_probs[inside].all()
    assert not got.tokens[segments(got) == 0].any()
    for row, prompt, length in zip(got.tokens, PROMPTS, LENGTHS, strict=True):
        np.testing.assert_array_equal(row[:length], prompt[:length])
    # The last token of a row is never run.
    wanted = kept.get("router_choice", {})
    ran = segments(got, 1)[None, :, :, None] > 0
    wanted = jax.tree.map(lambda leaf: np.where(ran, leaf, 8), wanted)
    jax.tree.map(np.testing.assert_array_equal, got.experts, wanted)
    if KINDS[kind].moe:
        assert jax.tree.leaves(got.experts)[0].shape[1:] == (3, 4 + MOST, 2)


@pytest.mark.parametrize("kind", slow_but_first)
def test_temperature_0_takes_the_likeliest_token_of_a_pass_without_a_cache(kind):
    got = run(kind, temperature=0.0, top_k=3)
    assert not got.finished.any() and (got.lengths == LENGTHS + MOST).all()
    logits = np.asarray(
        tiny.forward(KINDS[kind])(variables(kind), got.tokens, segments(got)).logits
    )
    inside = completion(got)
    best = logits[:, :, :VOCAB].argmax(axis=-1)
    np.testing.assert_array_equal(np.roll(got.tokens, -1, axis=1)[inside], best[inside])
    chances = jax.nn.log_softmax(logits[:, :, :VOCAB], axis=-1).max(axis=-1)
    np.testing.assert_allclose(got.log_probs[inside], chances[inside], atol=1e-5, rtol=0)


ONE = "dense"


@pytest.mark.parametrize("kind", [ONE, pytest.param("gqa, top_k", marks=pytest.mark.slow)])
def test_a_row_does_not_depend_on_the_others(kind):
    together = run(kind, experts=False)
    for i, length in enumerate(LENGTHS):
        # The same seed and prompt elsewhere in a batch of other prompts.
        prompts, lengths = np.full((3, 4), 2), np.array([3, 3, 3])
        seeds = np.arange(3, dtype=np.uint32)
        place = (i + 1) % 3
        prompts[place], lengths[place], seeds[place] = PROMPTS[i], length, SEEDS[i]
        other = run(kind, prompts, lengths, seeds, experts=False)
        np.testing.assert_array_equal(other.tokens[place], together.tokens[i])
        np.testing.assert_allclose(other.log_probs[place], together.log_probs[i], atol=1e-6)
    # Alone, and without padding.
    alone = run(kind, PROMPTS[1:2, :2], LENGTHS[1:2], SEEDS[1:2], experts=False)
    length = together.lengths[1]
    np.testing.assert_array_equal(alone.tokens[0, :length], together.tokens[1, :length])


def test_noise_follows_the_seed():
    first, again = run(ONE, temperature=2.0), run(ONE, temperature=2.0)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    other = run(ONE, temperature=2.0, seeds=SEEDS + 1)
    assert (other.tokens != first.tokens).any(axis=1).all()
    same = run(ONE, np.tile(PROMPTS[:1], (3, 1)), LENGTHS[[0, 0, 0]], temperature=2.0)
    assert len(np.unique(same.tokens, axis=0)) == 3


def test_other_options_run_by_the_same_program():
    run(ONE)
    before = sample_program._cache_size()
    run(ONE, temperature=0.3, top_p=0.5, top_k=4, min_p=0.1, seeds=SEEDS * 3)
    run(ONE, temperature=0.0, stops=(1, 2, 3))
    run(ONE, prompts=PROMPTS[::-1], lengths=LENGTHS[::-1])
    assert sample_program._cache_size() == before
    run(ONE, max_tokens=MOST + 1)
    assert sample_program._cache_size() == before + 1


def test_a_stop_token_ends_its_row():
    free = run(ONE, temperature=0.0)
    stop = int(free.tokens[0, 5])  # the second token of the first row's completion
    got = run(ONE, temperature=0.0, stops=(stop,))
    for row, length, done, prompt, before in zip(
        got.tokens, got.lengths, got.finished, LENGTHS, free.tokens, strict=True
    ):
        own = before[prompt : prompt + MOST].tolist()
        wanted = own.index(stop) + 1 if stop in own else MOST
        assert length == prompt + wanted and done == (stop in own)
        np.testing.assert_array_equal(row[:length], before[:length])
        assert not row[length:].any()
    assert got.finished[0]


def test_a_stop_token_first_and_a_completion_of_one_token():
    everything = tuple(range(VOCAB))
    got = run(ONE, stops=everything)
    np.testing.assert_array_equal(got.lengths, LENGTHS + 1)
    assert got.finished.all()
    single = run(ONE, max_tokens=1)
    assert single.tokens.shape == (3, 5) and not single.finished.any()
    np.testing.assert_array_equal(single.lengths, got.lengths)
    np.testing.assert_array_equal(single.tokens, got.tokens[:, :5])
    np.testing.assert_array_equal(single.log_probs, got.log_probs[:, :5])


def test_decoding_ends_when_all_rows_have(monkeypatch):
    """Steps are counted where a program calls back."""
    from moejax.models import decode

    calls, old = [], decode.Decoder.logits

    def counted(self, hidden):
        jax.debug.callback(lambda: calls.append(1))
        return old(self, hidden)

    monkeypatch.setattr(decode.Decoder, "logits", counted)
    decode.sample_program.clear_cache()
    free = run(ONE, temperature=0.0)
    jax.effects_barrier()
    assert len(calls) == MOST
    calls.clear()
    stops = tuple({int(row[length + 1]) for row, length in zip(free.tokens, LENGTHS, strict=True)})
    got = run(ONE, temperature=0.0, stops=stops)
    jax.effects_barrier()
    assert got.finished.all() and len(calls) == (got.lengths - LENGTHS).max() <= 2
    decode.sample_program.clear_cache()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt_lengths", dict(lengths=np.array([4, 0, 1]))),
        ("prompt_lengths", dict(lengths=np.array([4, 5, 1]))),
        ("prompt_lengths", dict(lengths=np.array([4, 4]))),
        ("prompts", dict(prompts=PROMPTS[0])),
        ("seeds", dict(seeds=SEEDS[:2])),
        ("stop_ids", dict(stops=(VOCAB,))),
        ("stop_ids", dict(stops=(3, -1))),
        ("max_tokens", dict(max_tokens=0)),
        ("temperature", dict(temperature=-0.1)),
        ("temperature", dict(temperature=1e-30)),
        ("top_k", dict(top_k=-1)),
        ("top_p", dict(top_p=0.0)),
        ("top_p", dict(top_p=1.01)),
        ("min_p", dict(min_p=-0.5)),
        ("min_p", dict(min_p=1.5)),
    ],
)
def test_what_cannot_be_sampled(field, changes):
    with pytest.raises(ConfigError) as error:
        run(ONE, **changes)
    assert error.value.field == f"sampling.{field}"


def test_a_vocabulary_that_the_model_has_not():
    with pytest.raises(ConfigError, match=r"sampling\.vocab_size = 33"):
        sample(
            KINDS[ONE], variables(ONE), PROMPTS, LENGTHS, SEEDS, options=SamplingConfig(),
            vocab_size=33,
        )  # fmt: skip


def test_what_is_beyond_the_vocabulary_is_never_sampled():
    config = dataclasses.replace(SamplingConfig(max_tokens=MOST), temperature=50.0)
    got = sample(
        KINDS[ONE], variables(ONE), PROMPTS, LENGTHS, SEEDS, options=config, vocab_size=3
    )  # fmt: skip
    inside = completion(got)
    assert set(np.roll(got.tokens, -1, axis=1)[inside]) == {0, 1, 2}
