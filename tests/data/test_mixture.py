"""Several sources opened as one text: split, tokenised, fingerprinted and refused."""

import dataclasses
import json
import platform

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data import (
    DataConfig,
    SourceConfig,
    baselines,
    batch_fingerprint,
    epochs_read,
    open_dataset,
    tokenizers,
    train_iterator,
)
from moejax.data.pretokenize import format_result, tokenize_corpus
from tests import sharded_batches

S = 16


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second corpus: 30 JSONL records of another kind of text, the last a copy of the first."""
    path = tmp_path_factory.mktemp("other") / "notes.jsonl"
    texts = [f"note {i}: " + "remember the milk, " * (1 + i % 5) for i in range(29)]
    path.write_text("".join(json.dumps({"body": t}) + "\n" for t in [*texts, texts[0] + "\n"]))
    return path


def _config(folder, other, **changes):
    blocks = changes.pop("blocks", ({}, {}))
    mixture = (
        SourceConfig("text", path=str(folder), label="sums", **blocks[0]),
        SourceConfig("text", path=str(other), text_field="body", **blocks[1]),
    )
    return DataConfig(mixture=mixture, **changes)


def _open(config, seq_len=S):
    return open_dataset(config, seq_len=seq_len, vocab_size=400)


def _texts(dataset, rows):
    tokens = rows.store
    starts = np.cumsum(tokens.lengths) - tokens.lengths
    return [
        dataset.tokenizer.decode(tokens.read(int(start) + 1, int(start) + int(length)))
        for start, length in zip(starts, tokens.lengths, strict=True)
    ]


def _alone(config, number):
    return _open(config.source_config(number))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_each_source_is_what_it_would_be_alone(folder, other, tokenizer):
    config = _config(folder, other, tokenizer=tokenizer, bpe_vocab_size=300)
    mixed = _open(config)
    assert [part.label for part in mixed.parts] == ["sums", "notes.jsonl"]
    tokens = [part.dataset.train_tokens for part in mixed.parts]
    assert [part.share for part in mixed.parts] == pytest.approx(np.array(tokens) / sum(tokens))
    for number, part in enumerate(mixed.parts):
        alone = _alone(config, number)
        assert _texts(mixed, part.dataset.train) == _texts(alone, alone.train)
        assert _texts(mixed, part.dataset.validation) == _texts(alone, alone.validation)
        assert part.dataset.tokenizer is mixed.tokenizer
        if tokenizer == "bytes":
            assert part.dataset.fingerprint == alone.fingerprint
    assert mixed.train_tokens == sum(tokens) == mixed.train_counts.sum()
    assert mixed.validation_tokens == mixed.validation_counts.sum()
    assert mixed.validation_bytes == sum(part.dataset.validation_bytes for part in mixed.parts)
    held_out = [t for part in mixed.parts for t in _texts(mixed, part.dataset.validation)]
    assert _texts(mixed, mixed.validation) == held_out
    assert set(baselines(mixed)) == set(baselines(mixed.parts[0].dataset)) == {"unigram", "gzip"}
    # In proportion to their tokens, all sources are read equally often.
    _, times = epochs_read(mixed, 5 * len(mixed.train))
    assert list(times.values()) == pytest.approx([5, 5], rel=0.05)


def test_weights_and_temperature_make_the_shares(folder, other):
    weighted = ({"weight": 1.0}, {"weight": 9.0})
    shares = lambda **changes: [p.share for p in _open(_config(folder, other, **changes)).parts]
    assert shares(blocks=weighted) == pytest.approx([0.1, 0.9])
    assert shares(blocks=weighted, temperature=2.0) == pytest.approx([0.25, 0.75])
    assert shares(temperature=1e9) == pytest.approx([0.5, 0.5])


def test_the_fingerprint_covers_sources_weights_temperature_and_order(folder, other, tmp_path):
    config = _config(folder, other)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(other.read_bytes())
    edited = tmp_path / "edited.jsonl"
    edited.write_text(other.read_text() + json.dumps({"body": "one more"}) + "\n")
    prints = [
        _open(found).fingerprint
        for found in (
            config,
            dataclasses.replace(config, mixture=config.mixture[::-1]),
            _config(folder, other, temperature=2.0),
            _config(folder, other, blocks=({"weight": 1.0}, {"weight": 2.0})),
            _config(folder, other, blocks=({"weight": 2.0}, {"weight": 1.0})),
            _config(folder, edited),
            _config(folder, other, deduplicate="exact"),
            _config(folder, other, blocks=({}, {"validation_fraction": 0.3})),
            config.source_config(0),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert _open(_config(folder, copy, prefetch=0)).fingerprint == prints[0]


# Made before there were mixtures: a single source keeps its fingerprint and its batches.
FOLDER = {
    "bytes": ("064954f832652ac0896e60a0fdc806da2523ea6346dfd1561f665bf783ff4310",
              "740e7967ea5a7f0333285ac1f8c6531358fb41530f216c89fb87141422a3c53c"),
    "bpe": ("bdf98b36c82ae69d7bc2592362bb000aee552a0c5cce6c5a85bca877aabc0d30",
            "729309835eafee9ca320bdc115624dd6b28657c7f30559d14da2f75bbfe4dadf"),
}  # fmt: skip
STDLIB = {
    "3.11.7": "5b25919aeba626587a213b5c18d536737239df0852016cfcaae9ae833137e6fb",
    "3.12.1": "f95ce697580c6315d7c4a07b028e54431bcf51b2ffebb2b5e2679680601cffdc",
}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_single_source_is_what_it_was(folder, tokenizer):
    config = DataConfig(source="text", path=str(folder), tokenizer=tokenizer, bpe_vocab_size=300)
    dataset = open_dataset(config, seq_len=32, vocab_size=512)
    iterator = train_iterator(dataset.train, batch_size=8, seed=3, start=5, prefetch=0)
    fingerprint, batch = FOLDER[tokenizer]
    assert dataset.fingerprint == fingerprint
    assert batch_fingerprint(next(iterator)) == batch
    assert sorted(dataset.provenance) == [
        "bytes", "documents", "licence", "path", "source", "train_documents", "unused_documents",
        "validation_documents",
    ]  # fmt: skip


def test_the_built_in_corpus_is_what_it_was():
    dataset = open_dataset(DataConfig(), seq_len=128, vocab_size=512)
    pinned = dataset.provenance["pinned"] is True
    version = platform.python_version()
    if not pinned or version not in STDLIB:
        pytest.skip(f"the library of Python {version} is not one whose fingerprint was recorded")
    assert dataset.fingerprint == STDLIB[version]


def test_provenance_names_every_source(folder, other):
    config = _config(folder, other, blocks=({"weight": 3.0}, {"weight": 1.0}), temperature=2.0)
    found = _open(config).provenance
    assert json.loads(json.dumps(found)) == found
    assert (found["source"], found["temperature"]) == ("mixture", 2.0)
    assert list(found["sources"]) == ["sums", "notes.jsonl"]
    sums = found["sources"]["sums"]
    assert (sums["weight"], sums["path"], sums["documents"]) == (3.0, str(folder), 40)
    assert sums["share"] == pytest.approx(3**0.5 / (1 + 3**0.5))
    assert len(sums["fingerprint"]) == 64 and "warning" not in found


def test_copies_are_dropped_across_sources_and_splits(folder, other, tmp_path):
    both = tmp_path / "both.jsonl"
    shared = [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.txt"))[:12]]
    lines = [json.dumps({"body": t + "\n"}) + "\n" for t in shared]
    both.write_text(other.read_text() + "".join(lines))
    once = _open(_config(folder, both, deduplicate="exact"))
    notes = once.provenance["sources"]["both.jsonl"]
    assert notes["duplicate_documents"] == len(shared) + 1  # and the copy within the notes
    assert once.provenance["sources"]["sums"]["duplicate_documents"] == 0
    held_out = {text.rstrip() for text in _texts(once, once.validation)}
    train = [t.rstrip() for part in once.parts for t in _texts(once, part.dataset.train)]
    assert len(train) == len(set(train)) and held_out.isdisjoint(train)
    # Without deduplication copies stay, but never of what is held out.
    lines = [json.dumps({"body": t}) + "\n" for t in shared]
    both.write_text(other.read_text() + "".join(lines))
    twice = _open(_config(folder, both, blocks=({"validation_fraction": 0.4}, {})))
    held_out = set(_texts(twice, twice.validation))
    train = [t for part in twice.parts for t in _texts(twice, part.dataset.train)]
    assert held_out.isdisjoint(train) and len(train) > len(set(train))
    dropped = twice.provenance["sources"]["both.jsonl"]["copies_of_held_out_documents"]
    assert dropped == len(set(shared) & set(_texts(twice, twice.parts[0].dataset.validation))) > 0


def test_the_bpe_is_trained_on_each_source_by_its_share(folder, other, monkeypatch):
    seen = []
    train = tokenizers.train_bpe
    keep = lambda texts, size: train([seen.append(t) or t for t in texts], size)
    monkeypatch.setattr(tokenizers, "train_bpe", keep)
    weights = ({"weight": 3.0}, {"weight": 1.0})
    config = _config(
        folder, other, tokenizer="bpe", bpe_vocab_size=293, bpe_sample_bytes=2000, blocks=weights
    )
    dataset = _open(config)
    notes = sum(len(text.encode()) for text in seen if text.startswith("note"))
    sums = sum(len(text.encode()) for text in seen) - notes
    assert notes == pytest.approx(500, abs=150) and sums == pytest.approx(1500, abs=400)
    assert set(seen).isdisjoint(_texts(dataset, dataset.validation))
    monkeypatch.setattr(tokenizers, "train_bpe", None)  # the second time it is in the cache
    assert _open(config).tokenizer.fingerprint == dataset.tokenizer.fingerprint


@pytest.fixture(scope="module")
def shards(folder, other, tmp_path_factory):
    """A mixture's shards, and the config that they were written from."""
    config = _config(
        folder, other, tokenizer="bpe", bpe_vocab_size=300, temperature=3.0, deduplicate="exact"
    )
    out = tmp_path_factory.mktemp("shards") / "out"
    return config, out, tokenize_corpus(config, out)


def _from_shards(out, **changes):
    sources = [SourceConfig("shards", path=str(out / name)) for name in ("sums", "notes.jsonl")]
    return DataConfig(mixture=tuple(sources), **changes)


def test_a_run_on_a_mixtures_shards_is_a_run_on_its_text(shards):
    config, out, result = shards
    text, stored = _open(config), _open(_from_shards(out, temperature=3.0))
    assert text.fingerprint == stored.fingerprint == result["fingerprint"]
    left, right = (
        sharded_batches.read(d.train, 3, batch_size=8, seed=1, start=40) for d in (text, stored)
    )
    for one, two in zip(left, right, strict=True):
        sharded_batches.assert_same(one, two)
    assert baselines(text) == baselines(stored)
    assert "warning" not in stored.provenance  # written together, so their splits were compared
    said = format_result(result)
    assert f"'path': '{out / 'sums'}'" in said and "data.temperature=3.0" in said
    assert "dropped 1 of 30 documents as copies, 0.0 MB" in said
    assert sorted(p.name for p in out.iterdir()) == ["notes.jsonl", "sums"]


def test_shards_beside_text_lend_it_their_tokenizer(shards, folder):
    _, out, _ = shards
    mixture = (
        SourceConfig("shards", path=str(out / "notes.jsonl")),
        SourceConfig("text", path=str(folder)),
    )
    found = _open(DataConfig(mixture=mixture))
    assert found.tokenizer.vocab_size == found.parts[0].dataset.tokenizer.vocab_size == 300
    assert "the shards of notes.jsonl hold no text" in found.provenance["warning"]


def test_shards_that_do_not_go_together(shards, other, tmp_path):
    _, out, _ = shards
    tokenize_corpus(
        DataConfig(source="text", path=str(other), text_field="body"), tmp_path / "bytes"
    )
    config = _from_shards(out)
    mixture = (*config.mixture[:1], SourceConfig("shards", path=str(tmp_path / "bytes")))
    with pytest.raises(ConfigError, match=r"data\.mixture\[1\]\.path = .*has another tokenizer"):
        _open(dataclasses.replace(config, mixture=mixture))
    with pytest.raises(ConfigError, match=r"data\.mixture\[0\]\.source = 'shards': holds shards"):
        tokenize_corpus(config, tmp_path / "again")
    with pytest.raises(ConfigError, match=r"several sources \(notes\.jsonl, sums\); name each"):
        _open(DataConfig(source="shards", path=str(out)))


def _written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing", None, "data.mixture[1].path = '{path}': no such file or folder"),
        ("empty.txt", "", "data.mixture[1].path = '{path}': holds no text at all"),
        ("one.jsonl", '{"body": "a single one"}\n', "data.mixture[1].path = '{path}': holds a"),
        ("field.jsonl", '{"text": "x"}\n{"text": "y"}\n', "data.mixture[1].text_field = 'body'"),
        ("short.txt", "a\nb\n", "the training text of source 'short.txt' has only"),
    ],
)
def test_a_source_that_cannot_be_used(folder, tmp_path, name, text, message):
    path = tmp_path / name if text is None else _written(tmp_path, name, text)
    with pytest.raises(ConfigError) as error:
        _open(_config(folder, path), seq_len=8)
    assert message.format(path=path) in str(error.value) and "\n" not in str(error.value)


def test_a_source_that_deduplication_leaves_empty(folder, tmp_path):
    copy = tmp_path / "copy.jsonl"
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.txt"))[:5]]
    copy.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    with pytest.raises(ConfigError, match=r"data\.mixture\[1\]\.path = .*sources before it have"):
        _open(_config(folder, copy, deduplicate="exact"))


def test_a_share_that_comes_to_nothing(folder, other):
    blocks = ({"weight": 1.0}, {"weight": 2.0})
    with pytest.raises(ConfigError, match=r"data\.temperature = 0\.001: leaves a source no row"):
        _open(_config(folder, other, blocks=blocks, temperature=1e-3))
    with pytest.raises(ConfigError, match=r"data\.mixture = .*leaves a source no row"):
        _open(_config(folder, other, blocks=({"weight": 1e-20}, {"weight": 2.0})))


def test_a_mixture_too_large_for_memory(folder, other):
    sizes = [_alone(_config(folder, other), i) for i in (0, 1)]
    whole = sum(found.provenance["bytes"] for found in sizes)
    with pytest.raises(ConfigError, match=rf"data\.max_bytes = {whole - 1}: .*moejax tokenize"):
        _open(_config(folder, other, max_bytes=whole - 1))
    assert _open(_config(folder, other, max_bytes=whole)).parts
