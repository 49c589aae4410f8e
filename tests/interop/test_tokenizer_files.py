"""A run's tokenizer for Transformers: the same ids, after the separator."""

import json

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.tokenizers import FILE, BytesTokenizer, load_saved, save, train_bpe
from moejax.interop.tokenizer_files import tokenizer_files


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ours, and the exported file as the library reads it: of bytes and of a BPE."""
    folder = tmp_path_factory.mktemp("tokenizers")
    save(train_bpe(["a router sends each token to a few experts\n"] * 20, 300), folder)
    bpe = load_saved(folder)
    files = {
        "bytes": (BytesTokenizer(), tokenizer_files(BytesTokenizer(), None, 32)),
        "bpe": (bpe, tokenizer_files(bpe, (folder / FILE).read_text(), 32)),
    }
    return {name: (own, hf.Tokenizer.from_str(made[FILE])) for name, (own, made) in files.items()}


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_same_ids_after_the_separator(pairs, text):
    for own, exported in pairs.values():
        encoded = exported.encode(text.replace("<|endoftext|>", "")).ids
        assert encoded[0] == own.separator
        assert encoded[1:] == own.encode(text.replace("<|endoftext|>", "")).tolist()
        assert exported.decode(encoded) == text.replace("<|endoftext|>", "")


def test_bytes_are_their_own_ids(pairs):
    _, exported = pairs["bytes"]
    assert exported.encode("a é\n").ids == [256, 97, 32, 0xC3, 0xA9, 10]
    assert exported.get_vocab_size() == 257


def test_the_config_names_the_separator_and_the_length():
    files = tokenizer_files(BytesTokenizer(), None, 32)
    config = json.loads(files["tokenizer_config.json"])
    assert config["bos_token"] == config["eos_token"] == "<|endoftext|>"
    assert config["model_max_length"] == 32
