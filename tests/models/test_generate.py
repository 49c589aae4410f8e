"""Texts: continued, cut at stop texts, shown piece by piece."""

import jax
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.data.tokenizers import BytesTokenizer
from moejax.models import generate as module
from moejax.models.decode import SamplingConfig
from moejax.models.generate import _Text, bucket, generate


class Letters:
    """A tokenizer of 20 letters; id 0 separates documents."""

    separator = 0
    vocab_size = 21

    def encode(self, text):
        return np.array([ord(letter) - ord("a") + 1 for letter in text], np.int32)

    def decode(self, ids):
        assert all(0 < i < self.vocab_size for i in ids)
        return "".join(chr(ord("a") + i - 1) for i in ids)


CONFIG = tiny.dense_config(num_layers=1, mtp_depth=1)
VARIABLES = tiny.variables(CONFIG)
TOKENS = 20


def run(prompt="cad", *, temperature=0.0, **options):
    sampling = SamplingConfig(max_tokens=TOKENS, temperature=temperature)
    return generate(CONFIG, VARIABLES, Letters(), prompt, options=sampling, **options)


def wanted(prompt):
    """The likeliest tokens, by passes over all of the text."""
    ids = [0, *Letters().encode(prompt).tolist()]
    for end in range(len(ids), len(ids) + TOKENS):
        row = np.zeros((1, 32), np.int32)
        row[0, :end] = ids
        logits = tiny.forward(CONFIG)(VARIABLES, row).logits[0, end - 1, :21]
        ids.append(int(logits.argmax()))
        if ids[-1] == 0:
            break
    return Letters().decode([i for i in ids if i])


def test_a_text_is_continued_and_shown_as_it_is_made():
    pieces = []
    got = run(count=2, show=pieces.append)
    assert got.texts == [wanted("cad")] * 2
    assert "".join(pieces) == got.texts[0] and pieces[0] == "cad" and len(pieces) > 2
    assert got.tokens in (2 * TOKENS, 2 * (len(got.texts[0]) - 3 + 1))
    assert got.seconds > 0 and got.accepted_share is None


def test_prompts_of_one_bucket_run_by_one_program():
    assert [bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
    run()
    sizes = module._begin._cache_size(), module._advance._cache_size()
    assert run("").texts == [wanted("")]
    hot = run("dabace", temperature=1.5, seed=3)
    assert run("dabace", temperature=1.5, seed=3).texts == hot.texts
    assert run("dabace", temperature=1.5, seed=4).texts != hot.texts
    assert (module._begin._cache_size(), module._advance._cache_size()) == sizes


def test_stop_texts_end_a_text():
    whole = run().texts[0]
    stop = whole[8:10]
    pieces = []
    got = run(stops=("never", stop), show=pieces.append)
    assert got.texts == ["cad" + whole[3:].split(stop)[0]] and "".join(pieces) == got.texts[0]


def test_speculation_gives_the_same_text():
    got = run(speculate=1)
    assert got.texts == run().texts and 0 <= got.accepted_share <= 1


def shown(pieces, *stops, start=b""):
    """What a growing text of bytes shows, piece by piece."""
    out = []
    ids = [256, *start]
    text = _Text(BytesTokenizer(), ids, start.decode(), stops, out.append)
    row = list(ids)
    for i, piece in enumerate(pieces):
        row += list(piece)
        text.take(row, i == len(pieces) - 1)
    return out[1:]


def test_incomplete_characters_are_held_back():
    euro = "é€".encode()
    assert shown([euro[:1], euro[1:3], euro[3:4], euro[4:]]) == ["é", "€"]
    # What never becomes a character is shown once something follows, or at the end.
    assert shown([b"a\xff", b"b", b"\xe2"]) == ["a", "\ufffdb", "\ufffd"]
    assert shown([b"c"], start="é".encode()) == ["c"]


def test_beginnings_of_stop_texts_are_held_back():
    assert shown([b"one <", b"en", b"d", b"> two"], "<end>") == ["one "]
    assert shown([b"one <", b"en", b"g", b"!"], "<end>") == ["one ", "<eng", "!"]
    assert shown([b"abab", b"abc"], "ababc") == ["ab"]
    assert shown([b"x<", b"end"], "<end>") == ["x", "<end"]


def test_a_separator_ends_the_text():
    out = []
    text = _Text(BytesTokenizer(), [256], "", (), out.append)
    text.take([256, 97, 256], True)
    text.take([256, 97, 256, 98], True)
    assert out == ["", "a"] and text.shown == "a" and text.ended


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"sampling\.speculate"):
        run(speculate=99)
    assert not jax.config.jax_enable_x64
