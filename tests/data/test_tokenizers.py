"""Tokenizers: lossless, deterministic, saved and loaded, and clear about broken files."""

import json
import string

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError, UserError
from moejax.data import tokenizers
from moejax.data.tokenizers import BytesTokenizer, load_json, load_saved, save, train_bpe

TEXTS = [f"def f{i}(x):\n    return x + {i}  # naïve\n" * 4 for i in range(30)]
UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


def test_bytes_by_hand():
    tokenizer = BytesTokenizer()
    # é is the two bytes C3 A9 in UTF-8.
    assert tokenizer.encode("aé").tolist() == [0x61, 0xC3, 0xA9]
    assert tokenizer.encode("aé").dtype == np.int32
    assert tokenizer.separator == 256
    assert tokenizer.vocab_size == 257
    # The separator and the padding of a larger vocabulary give nothing; half a character gives �.
    assert tokenizer.decode([0x61, 256, 300, 0xC3, 0xA9, 0xC3]) == "aé�"


@settings(max_examples=150, deadline=None)
@given(text=UNICODE | st.sampled_from([" <|endoftext|>x", "\r\n\t  a", "\0", ""]))
def test_round_trip_of_any_text(bpe, text):
    for tokenizer in (BytesTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.separator not in ids.tolist()
        assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        (batched,) = tokenizer.encode_batch([text])
        assert batched.tolist() == ids.tolist()


def test_bpe_is_deterministic_and_merges(bpe):
    assert train_bpe(TEXTS, 300).fingerprint == bpe.fingerprint
    assert train_bpe(TEXTS, 290).fingerprint != bpe.fingerprint
    assert bpe.vocab_size == 300
    text = TEXTS[0]
    assert len(bpe.encode(text)) < len(text.encode()) / 2
    # White space after a mark is one piece with it, indentation included.
    assert "):\n    " in [bpe.decode([i]) for i in range(300)]


def test_short_texts_make_fewer_ids():
    assert 257 <= train_bpe(["ab"], 1000).vocab_size < 300


def test_saved_tokenizers_come_back(bpe, tmp_path):
    for name, tokenizer in (("bytes", BytesTokenizer()), ("bpe", bpe)):
        save(tokenizer, tmp_path / name)
        loaded = load_saved(tmp_path / name)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.separator == tokenizer.separator
        assert loaded.encode("x <|endoftext|> y").tolist() == (
            tokenizer.encode("x <|endoftext|> y").tolist()
        )


@pytest.mark.parametrize("damage", ["nothing", "description", "file"])
def test_a_folder_without_a_whole_tokenizer(bpe, tmp_path, damage):
    if damage != "nothing":
        save(bpe, tmp_path)
        name = tokenizers.DESCRIPTION if damage == "description" else tokenizers.FILE
        (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="holds no readable tokenizer"):
        load_saved(tmp_path)


def _word_level(tmp_path, *special):
    vocabulary = {word: i for i, word in enumerate([*string.ascii_lowercase, "[UNK]", *special])}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    if special:
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], vocabulary[special[0]])]
        )
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=5)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_given_file_without_its_own_separators_truncation_and_padding(tmp_path):
    tokenizer = load_json(_word_level(tmp_path, "</s>"))
    assert tokenizer.separator == 27
    assert tokenizer.vocab_size == 28
    assert tokenizer.encode("a b c").tolist() == [0, 1, 2]


def test_a_named_separator(tmp_path):
    path = _word_level(tmp_path, "</s>", "<end>")
    assert load_json(path, "<end>").separator == 28
    with pytest.raises(ConfigError, match=r"data\.separator = '<stop>': not a token"):
        load_json(path, "<stop>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
        (b'{"version": "1.0"', "not a tokenizer.json"),
        (None, "no such file"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_json(path)
    assert str(error.value).startswith(f"data.tokenizer = {str(path)!r}: ")
    assert "\n" not in str(error.value)


def test_a_file_without_a_separator(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.separator = '': none of the usual"):
        load_json(_word_level(tmp_path))


def test_description_says_nothing_but_the_kind(bpe, tmp_path):
    save(bpe, tmp_path)
    description = json.loads((tmp_path / tokenizers.DESCRIPTION).read_text())
    assert description == {"kind": "json", "separator": bpe.separator}


def test_a_sample_is_spread_over_the_corpus():
    texts = [f"{i:05d}" for i in range(1000)]
    sample = list(tokenizers.spread_sample(texts, 5000, 500))
    assert 90 <= len(sample) <= 110
    numbers = np.array([int(text) for text in sample])
    assert np.diff(numbers).max() <= 12
    assert list(tokenizers.spread_sample(texts, 5000, 10_000)) == texts
