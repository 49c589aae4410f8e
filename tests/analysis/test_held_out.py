"""A run's held-out text with the document of every token."""

import dataclasses

import numpy as np
import pytest

from moejax.analysis import held_out
from moejax.config import ConfigError
from moejax.data import DataConfig, Rows, open_dataset, splits
from moejax.data.dataset import split_of
from moejax.data.pretokenize import open_shards, tokenize_corpus
from moejax.data.store import encode_all
from moejax.data.tokenizers import BytesTokenizer, save


def test_every_token_knows_its_document():
    # Documents of 3, 9 and 2 letters are cut into pieces of at most 4 (input, target) pairs; every
    # real position holds the pair of its own document, padding none.
    texts = ["aaa", "bbbbbbbbb", "cc"]
    tokenizer = BytesTokenizer()
    rows = Rows(encode_all(texts, tokenizer), 4)
    letters = {0: ord("a"), 1: ord("b"), 2: ord("c")}
    counts = [0, 0, 0]
    found = list(held_out.batches(rows, batch_size=2, max_batches=99))
    for batch in found:
        np.testing.assert_array_equal(batch["documents"] >= 0, batch["segment_ids"] > 0)
        for document, token in zip(batch["documents"].flat, batch["tokens"].flat, strict=True):
            if document >= 0:
                assert token in (letters[document], tokenizer.separator)
                counts[document] += 1
    assert counts == [4, 10, 3]
    assert all(batch["tokens"].shape == (2, 4) for batch in found)


def test_fewer_batches_are_spread_over_the_rows():
    rows = Rows(encode_all([chr(97 + i) * 3 for i in range(8)], BytesTokenizer()), 4)
    found = list(held_out.batches(rows, batch_size=1, max_batches=4))
    assert [batch["documents"][0, 0] for batch in found] == [0, 2, 4, 6]


def test_domains_by_folder_else_by_kind_else_none():
    domains = held_out.find_domains(["a/x.py", "b/y.py", "a/c/z.py", "setup.py"])
    assert domains.kind == "top-level folder"
    assert domains.names == ("a", "(top level)", "b")
    np.testing.assert_array_equal(domains.of_document, [0, 2, 0, 1])
    domains = held_out.find_domains(["a/x.py", "a/y.md", "a/Makefile", "a/z.py"])
    assert domains.kind == "file kind" and domains.names == (".py", "(none)", ".md")
    assert held_out.find_domains(["a/x.py", "a/y.py"]) is None


def test_many_domains_are_the_largest_and_the_others():
    paths = [f"{folder}/{i}.txt" for folder in range(20) for i in range(20 - folder)]
    domains = held_out.find_domains(paths)
    assert len(domains.names) == held_out.MOST_DOMAINS
    assert domains.names[0] == "0" and domains.names[-1] == "(others)"
    assert np.bincount(domains.of_document)[-1] == sum(20 - i for i in range(11, 20))


@pytest.fixture
def corpus(tmp_path):
    for i in range(20):
        folder = tmp_path / "text" / ("odd" if i % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text(f"{'odd' if i % 2 else 'even'} text, number {i}\n" * 9)
    return DataConfig(source="text", path=str(tmp_path / "text"), validation_fraction=0.4)


def open_it(config, tmp_path, fingerprint=None):
    dataset = open_dataset(config, seq_len=16, vocab_size=257)
    dataset.tokenizer.save(tmp_path / "tokenizer")
    return dataset, held_out.open_held_out(
        config, seq_len=16, tokenizer_folder=tmp_path / "tokenizer",
        fingerprint=fingerprint or dataset.fingerprint,
    )  # fmt: skip


def test_the_rows_are_the_runs_and_documents_have_their_domain(corpus, tmp_path):
    dataset, found = open_it(corpus, tmp_path)
    assert len(found.rows) == len(dataset.validation) > 3
    for i in range(len(found.rows)):
        np.testing.assert_array_equal(found.rows[i]["tokens"], dataset.validation[i]["tokens"])
    texts = split_of(corpus, None).texts(splits.VALIDATION)
    domains = found.domains
    for text, domain in zip(texts, domains.of_document, strict=True):
        assert text.startswith(domains.names[domain])


def test_records_are_told_apart_by_their_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "text" / name).mkdir(parents=True)
        lines = [f'{{"text": "{name} record {i} of some"}}' for i in range(20)]
        (tmp_path / "text" / name / "a.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "text")
    _, found = open_it(DataConfig(source="text", path=path, validation_fraction=0.4), tmp_path)
    assert set(found.domains.names) == {"one", "two"}


def test_a_single_file_has_no_domains_and_says_so(tmp_path):
    (tmp_path / "text.txt").write_text("one line of text\n" * 99)
    config = DataConfig(source="text", path=str(tmp_path / "text.txt"))
    _, found = open_it(config, tmp_path)
    assert found.domains is None and "paths" in found.why


def test_another_corpus_is_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="restore the text"):
        open_it(corpus, tmp_path, fingerprint="another")
    missing = dataclasses.replace(corpus, path=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"data\.path"):
        held_out.open_held_out(
            missing, seq_len=16, tokenizer_folder=tmp_path / "tokenizer", fingerprint="x"
        )


def test_with_text_of_files_and_of_shards_alike(corpus, tmp_path):
    dataset = open_dataset(corpus, seq_len=16, vocab_size=257)
    folder = tmp_path / "tokenizer"
    save(dataset.tokenizer, folder)
    tokenize_corpus(corpus, tmp_path / "shards")
    shards = DataConfig(source="shards", path=str(tmp_path / "shards"))
    wanted = list(split_of(corpus, None).texts(splits.VALIDATION))
    for config in (corpus, shards):
        found = held_out.open_held_out(
            config, seq_len=16, tokenizer_folder=folder, fingerprint=dataset.fingerprint,
            with_text=True,
        )  # fmt: skip
        assert list(found.texts) == wanted
        np.testing.assert_array_equal(found.train_counts, dataset.train_counts)
    assert found.domains is None and "shards" in found.why


def test_shards_whose_tokens_lose_text_have_no_bytes(corpus, tmp_path, monkeypatch):
    tokenize_corpus(corpus, tmp_path / "shards")
    dataset = open_shards(tmp_path / "shards", 16)
    monkeypatch.setattr(BytesTokenizer, "decode", lambda self, ids: "lost")
    with pytest.raises(ConfigError, match="evaluate a run on the text itself"):
        held_out._spelled(dataset, "shards")
