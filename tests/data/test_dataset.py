"""The whole way from a config to rows, with its caches and refusals."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers as hf

from moejax.config import ConfigError
from moejax.data import DataConfig, baselines, epochs, open_dataset, tokenizers
from moejax.data import dataset as dataset_module


def _decoded_documents(dataset, rows):
    """The documents of a split, put together again from the store."""
    starts = np.cumsum(rows.store.lengths) - rows.store.lengths
    return [
        dataset.tokenizer.decode(rows.store.read(int(start) + 1, int(start) + int(length)))
        for start, length in zip(starts, rows.store.lengths, strict=True)
    ]


def _row_texts(dataset, rows):
    return {dataset.tokenizer.decode(rows[i]["targets"]) for i in range(len(rows))}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_in_one_split_and_comes_back_as_it_was(config, folder, tokenizer):
    config = dataclasses.replace(config, tokenizer=tokenizer, bpe_vocab_size=300)
    dataset = open_dataset(config, seq_len=32, vocab_size=300)
    files = sorted(folder.rglob("*.txt"), key=lambda p: p.relative_to(folder).as_posix())
    texts = [file.read_text(encoding="utf-8") for file in files]
    train = _decoded_documents(dataset, dataset.train)
    validation = _decoded_documents(dataset, dataset.validation)
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in train]  # in the order of paths
    assert not set(train) & set(validation)
    assert dataset.train_bytes == sum(len(text.encode()) for text in train)
    assert dataset.validation_bytes == sum(len(text.encode()) for text in validation)
    ids = sum(len(dataset.tokenizer.encode(text)) for text in train)
    assert dataset.train_tokens == ids + len(train) == dataset.train_counts.sum()
    assert dataset.validation_tokens == dataset.validation_counts.sum()
    assert dataset.train.fill > 0.97
    assert epochs(dataset, 3 * dataset.train_tokens) == 3
    assert set(baselines(dataset)) == {"unigram", "gzip"}
    assert json.loads(json.dumps(dataset.provenance)) == dataset.provenance
    assert dataset.provenance["documents"] == len(texts)


def test_fingerprint_is_equal_for_equal_text_split_and_tokenizer(config, folder, tmp_path):
    def fingerprint(**changes):
        changed = dataclasses.replace(config, **changes)
        return open_dataset(changed, seq_len=changes.get("seq", 32), vocab_size=300).fingerprint

    copy = tmp_path / "copy"
    for file in folder.rglob("*.txt"):
        target = copy / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    first = fingerprint()
    assert first == fingerprint(path=str(copy), prefetch=0)
    assert first != fingerprint(tokenizer="bpe", bpe_vocab_size=280)
    assert first != fingerprint(validation_fraction=0.2)
    (copy / "part0" / "0.txt").write_text("edited")
    assert first != fingerprint(path=str(copy))


def test_a_second_start_reads_tokens_and_tokenizer_from_the_cache(config, monkeypatch):
    config = dataclasses.replace(config, tokenizer="bpe", bpe_vocab_size=290)
    first = open_dataset(config, seq_len=32, vocab_size=290)

    def never(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(tokenizers, "train_bpe", never)
    monkeypatch.setattr(dataset_module.store, "encode_all", never)
    second = open_dataset(config, seq_len=32, vocab_size=290)
    assert first.fingerprint == second.fingerprint
    assert baselines(first) == baselines(second)
    assert len(first.train) == len(second.train)
    for i in range(len(first.train)):
        for name, value in first.train[i].items():
            np.testing.assert_array_equal(value, second.train[i][name])


def test_a_damaged_cache_is_made_again(config):
    config = dataclasses.replace(config, tokenizer="bpe", bpe_vocab_size=291)
    first = open_dataset(config, seq_len=32, vocab_size=291)
    for file in config.cache_path.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:-1])
    second = open_dataset(config, seq_len=32, vocab_size=291)
    np.testing.assert_array_equal(first.train[0]["tokens"], second.train[0]["tokens"])


def test_the_bpe_never_sees_held_out_text(config, monkeypatch):
    seen = []
    train = tokenizers.train_bpe
    monkeypatch.setattr(
        tokenizers,
        "train_bpe",
        lambda texts, size: train([seen.append(t) or t for t in texts], size),
    )
    config = dataclasses.replace(config, tokenizer="bpe", bpe_vocab_size=292)
    dataset = open_dataset(config, seq_len=32, vocab_size=292)
    assert seen
    assert not set(seen) & set(_decoded_documents(dataset, dataset.validation))


def test_a_model_vocabulary_may_be_larger_than_the_tokenizers_but_not_smaller(config):
    dataset = open_dataset(config, seq_len=32, vocab_size=512)
    assert dataset.tokenizer.vocab_size == 257
    assert "warning" not in dataset.provenance
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 256: .*'bytes'\) has 257 ids"):
        open_dataset(config, seq_len=32, vocab_size=256)


def test_a_given_tokenizer_with_too_many_ids_names_both(config, tmp_path):
    path = tmp_path / "tokenizer.json"
    words = {f"word{i}": i for i in range(400)} | {"</s>": 400, "[UNK]": 401}
    hf.Tokenizer(hf.models.WordLevel(words, unk_token="[UNK]")).save(str(path))
    config = dataclasses.replace(config, tokenizer=str(path))
    dataset = open_dataset(config, seq_len=2, vocab_size=402)
    assert dataset.tokenizer.separator == 400
    assert "does not give the text back" in dataset.provenance["warning"]
    with pytest.raises(ConfigError) as error:
        open_dataset(config, seq_len=2, vocab_size=401)
    assert str(path) in str(error.value)
    assert "402 ids" in str(error.value)
    assert "model.vocab_size = 401" in str(error.value)


def test_a_corpus_shorter_than_a_sequence(config):
    with pytest.raises(ConfigError, match=r"train\.seq_len = 20000: .*shorter than one sequence"):
        open_dataset(config, seq_len=20_000, vocab_size=257)
    loose = open_dataset(config, seq_len=20_000, vocab_size=257, train_required=False)
    assert len(loose.train) == 1


@pytest.mark.parametrize("seq_len", [0, -1])
def test_a_sequence_has_a_length(config, seq_len):
    with pytest.raises(ConfigError, match=r"train\.seq_len"):
        open_dataset(config, seq_len=seq_len, vocab_size=257)


def test_a_corpus_too_large_for_memory(config):
    with pytest.raises(ConfigError, match=r"data\.max_bytes = 100: .*moejax tokenize"):
        open_dataset(dataclasses.replace(config, max_bytes=100), seq_len=32, vocab_size=257)


def test_a_row_holds_text_of_its_own_split_only(config):
    dataset = open_dataset(config, seq_len=64, vocab_size=257)
    assert not _row_texts(dataset, dataset.train) & _row_texts(dataset, dataset.validation)


def test_the_cache_may_be_out_of_reach(config, tmp_path):
    (tmp_path / "file").write_text("")
    changes = {"tokenizer": "bpe", "bpe_vocab_size": 270, "cache_dir": str(tmp_path / "file" / "x")}
    dataset = open_dataset(dataclasses.replace(config, **changes), seq_len=32, vocab_size=270)
    assert dataset.tokenizer.vocab_size == 270


def test_defaults_are_the_built_in_corpus_as_bytes():
    assert (DataConfig().source, DataConfig().tokenizer) == ("stdlib", "bytes")
