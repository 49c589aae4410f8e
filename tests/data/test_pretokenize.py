"""Shards: the same rows as from the text, and clear refusals of damaged folders."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moejax.config import ConfigError, UserError
from moejax.data import DataConfig, baselines, open_dataset, pretokenize, train_iterator
from moejax.data.pretokenize import format_result, tokenize_corpus


def _open(path, seq_len=32):
    config = DataConfig(source="shards", path=str(path))
    return open_dataset(config, seq_len=seq_len, vocab_size=300)


def _assert_same_rows(left, right):
    assert len(left) == len(right)
    assert left.targets == right.targets
    for i in range(len(left)):
        for name, value in left[i].items():
            np.testing.assert_array_equal(value, right[i][name])


@pytest.fixture
def shards(config, tmp_path):
    tokenize_corpus(config, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_rows_from_shards_are_the_rows_from_text(config, tmp_path, tokenizer):
    config = dataclasses.replace(config, tokenizer=tokenizer, bpe_vocab_size=300)
    out, lines = tmp_path / "new" / "shards", []
    # Small records and shards, so that pieces reach over the ends of both.
    manifest = tokenize_corpus(config, out, shard_tokens=500, record_tokens=10, report=lines.append)
    assert len(manifest["splits"]["train"]["files"]) > 2
    assert any("documents" in line for line in lines)
    assert f"{manifest['splits']['train']['tokens']:,} tokens" in format_result(manifest)
    memory, shards = open_dataset(config, seq_len=32, vocab_size=300), _open(out)
    _assert_same_rows(memory.train, shards.train)
    _assert_same_rows(memory.validation, shards.validation)
    assert memory.fingerprint == shards.fingerprint == manifest["fingerprint"]
    assert baselines(memory) == baselines(shards)
    assert memory.tokenizer.fingerprint == shards.tokenizer.fingerprint
    for name in ("train_bytes", "validation_bytes", "train_tokens", "validation_tokens"):
        assert getattr(memory, name) == getattr(shards, name)
    assert shards.provenance["shards"] == str(out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["shards"]  # no temporary folder stays


def test_shards_feed_the_iterator_on_threads(shards):
    rows = _open(shards).train
    iterator = train_iterator(rows, batch_size=8, seed=0, prefetch=4)
    batches = [next(iterator) for _ in range(10)]
    iterator.close()
    again = train_iterator(rows, batch_size=8, seed=0, start=7, prefetch=0)
    np.testing.assert_array_equal(batches[7]["tokens"], next(again)["tokens"])
    again.close()


def test_parquet_and_jsonl_records(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    texts = [f"record {i} says {i * i}" for i in range(60)]
    pq.write_table(pa.table({"body": texts[:30]}), source / "a.parquet")
    (source / "b.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts[30:]))
    config = DataConfig(source="text", path=str(source), text_field="body")
    manifest = tokenize_corpus(config, tmp_path / "out")
    counts = [manifest["splits"][split]["documents"] for split in ("train", "validation")]
    assert sum(counts) == 60
    assert min(counts) >= 1
    _assert_same_rows(
        _open(tmp_path / "out").train, open_dataset(config, seq_len=32, vocab_size=300).train
    )


def test_an_output_folder_may_be_empty_but_not_in_use(config, tmp_path):
    (tmp_path / "empty").mkdir()
    tokenize_corpus(config, tmp_path / "empty")
    assert (tmp_path / "empty" / pretokenize.MANIFEST).is_file()
    with pytest.raises(ConfigError, match=r"--out = .*is not an empty folder"):
        tokenize_corpus(config, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        tokenize_corpus(config, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--out = .*cannot be written"):
        tokenize_corpus(config, tmp_path / "file" / "below")


def test_a_failure_leaves_nothing(config, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretokenize, "gzip_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_shards_are_not_tokenised_again(shards, tmp_path):
    config = DataConfig(source="shards", path=str(shards))
    with pytest.raises(ConfigError, match=r"data\.source = 'shards': holds shards already"):
        tokenize_corpus(config, tmp_path / "again")


def _damage(shards, what):
    if what == "manifest missing":
        (shards / pretokenize.MANIFEST).unlink()
    elif what == "manifest damaged":
        (shards / pretokenize.MANIFEST).write_text('{"format": 1}')
    elif what == "manifest no json":
        (shards / pretokenize.MANIFEST).write_text("{")
    elif what == "other format":
        path = shards / pretokenize.MANIFEST
        path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    elif what == "shard short":
        shard = shards / "train-00000.array_record"
        shard.write_bytes(shard.read_bytes()[:-1])
    elif what == "shard missing":
        (shards / "validation-00000.array_record").unlink()
    elif what == "index damaged":
        index = shards / "train_lengths.npy"
        index.write_bytes(index.read_bytes()[:-1] + b"\x07")
    elif what == "index missing":
        (shards / "train_counts.npy").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("manifest missing", "has no manifest.json; write the shards with `moejax tokenize`"),
        ("manifest damaged", "manifest.json is damaged"),
        ("manifest no json", "manifest.json is damaged"),
        ("other format", "has format 99, not 1"),
        ("shard short", "train-00000.array_record has"),
        ("shard missing", "validation-00000.array_record is missing"),
        ("index damaged", "train_lengths.npy is damaged"),
        ("index missing", "train_counts.npy is missing"),
    ],
)
def test_a_damaged_folder(shards, what, message):
    _damage(shards, what)
    with pytest.raises(ConfigError) as error:
        _open(shards)
    assert str(error.value).startswith(f"data.path = {str(shards)!r}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_in_a_record_is_never_read_as_tokens(shards):
    shard = shards / "train-00000.array_record"
    content = bytearray(shard.read_bytes())
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    content[used[len(used) // 2]] ^= 1
    shard.write_bytes(content)
    rows = _open(shards).train
    with pytest.raises(UserError, match=r"damaged .*; write the shards again"):
        [rows[i] for i in range(len(rows))]


def test_no_folder_at_all(tmp_path):
    with pytest.raises(ConfigError, match=r"has no manifest\.json"):
        _open(tmp_path / "absent")


def test_a_small_vocabulary_names_the_shards(shards):
    config = DataConfig(source="shards", path=str(shards))
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 100: the tokenizer in .* 257 ids"):
        open_dataset(config, seq_len=32, vocab_size=100)
