"""A config's text, opened: tokenized, packed, and counted."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Int64

from moejax import config as config_lib
from moejax.data import baselines as baselines_lib
from moejax.data import cache, splits, stdlib_corpus, store, tokenizers
from moejax.data.data_config import PAIRED, DataConfig
from moejax.data.documents import Corpus, text_corpus
from moejax.data.duplicates import Seen
from moejax.data.mixing import MixedRows
from moejax.data.packing import Rows
from moejax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture: what it is called, its share of the tokens drawn, and its text."""

    label: str
    share: float
    dataset: "TextDataset"


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """Packed training and validation rows of one corpus, or a mixture, under one tokenizer.

    Attributes:
      tokenizer: text to ids and back.
      train, validation: packed rows, by random access.
      train_bytes, validation_bytes: UTF-8 bytes of text; of pairs, of their completions.
      train_tokens: targets in all rows, ids and one separator a document.
      validation_tokens: held-out targets that a loss counts: all of them; of pairs, those of
        completions.
      fingerprint: equal for the same text, the same held-out part and the same tokenizer.
      provenance: JSON-ready account of where the text is from.
      train_counts, validation_counts: how often each id is a target.
      gzip_bytes: ``gzip -9`` of the held-out text as one stream; of a mixture, each source's.
      parts: the sources of a mixture; empty for a single corpus.
    """

    tokenizer: Tokenizer
    train: Rows | MixedRows
    validation: Rows
    train_bytes: int
    validation_bytes: int
    fingerprint: str
    provenance: dict[str, Any]
    train_counts: Int64[np.ndarray, " V"]
    validation_counts: Int64[np.ndarray, " V"]
    gzip_bytes: int
    parts: tuple[Part, ...] = ()

    @property
    def train_tokens(self) -> int:
        return self.train.targets

    @property
    def validation_tokens(self) -> int:
        return self.validation.counted


def baselines(dataset: TextDataset) -> dict[str, float]:
    """Bits per byte of simple models on the dataset's held-out bytes.

    Returns:
      ``unigram``: held-out targets under add-one-smoothed training counts of the same tokens;
      ``gzip``: ``gzip -9`` of the held-out bytes as one stream.
    """
    nats = baselines_lib.unigram_nats(dataset.train_counts, dataset.validation_counts)
    return {
        "unigram": baselines_lib.bits_per_byte(nats, dataset.validation_bytes),
        "gzip": 8.0 * dataset.gzip_bytes / dataset.validation_bytes,
    }


def epochs(dataset: TextDataset, tokens_planned: float) -> float:
    """How often a run over so many tokens goes through the unique training tokens."""
    return tokens_planned / dataset.train_tokens


def epochs_read(dataset: TextDataset, rows: int) -> tuple[float, dict[str, float]]:
    """How often ``rows`` rows, as ``train_iterator`` draws them, go through the training text.

    Returns:
      Over all unique tokens, and of a mixture's sources, by label.
    """
    if not dataset.parts:
        return rows / len(dataset.train), {}
    times = dataset.train.epochs(rows)
    of_source = {part.label: own for part, own in zip(dataset.parts, times, strict=True)}
    tokens = sum(
        own * part.dataset.train_tokens for part, own in zip(dataset.parts, times, strict=True)
    )
    return tokens / dataset.train_tokens, of_source


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the source that a config names, except shards, which hold tokens and no text.

    Raises:
      ConfigError: nothing there, or nothing that can be read.
    """
    if config.source == "stdlib":
        return stdlib_corpus.stdlib_corpus()
    if config.source == "text":
        return text_corpus(
            config.path,
            config.text_field,
            lambda size: splits.validation_budget(
                size, config.validation_fraction, config.max_validation_bytes
            ),
        )
    config_lib.check(
        config.source not in PAIRED,
        "data.source",
        config.source,
        "holds pairs of prompt and completion, not documents; only `moejax train` reads them",
    )
    from moejax.data import tfds_source  # tfds is slow to import

    return tfds_source.tfds_corpus(config)


def split_of(config: DataConfig, max_bytes: int | None) -> splits.SplitCorpus:
    """Opens a config's corpus and decides what is held out; see ``splits.split_corpus``."""
    return splits.finish(draft_of(config, max_bytes, new_seen(config)))


def draft_of(config: DataConfig, max_bytes: int | None, seen: Seen | None) -> splits.Draft:
    """Opens a config's corpus and assigns its documents; see ``splits.draft``."""
    corpus = open_corpus(config)
    fraction, most = config.validation_fraction, config.max_validation_bytes
    return splits.draft(corpus, fraction, most, max_bytes, seen)


def new_seen(config: DataConfig) -> Seen | None:
    """Where documents are remembered by ``data.deduplicate``; None where copies stay."""
    return Seen() if config.deduplicate == "exact" else None


def choose_tokenizer(config: DataConfig, corpus: splits.SplitCorpus) -> Tokenizer:
    """The tokenizer that a config names; a BPE is trained on the training split and cached.

    Raises:
      ConfigError: a tokenizer.json that cannot be used.
    """
    if config.tokenizer != "bpe":
        return given_tokenizer(config)
    recipe = (corpus.train_fingerprint, config.bpe_vocab_size, config.bpe_sample_bytes)
    texts = lambda: tokenizers.spread_sample(
        corpus.texts(splits.TRAIN), corpus.train_bytes, config.bpe_sample_bytes
    )
    return trained_tokenizer(config, recipe, texts)


def given_tokenizer(config: DataConfig) -> Tokenizer:
    """Bytes, or the tokenizer.json that a config names; raises ConfigError on one of no use."""
    if config.tokenizer == "bytes":
        return tokenizers.BytesTokenizer()
    return tokenizers.load_json(config.tokenizer, config.separator)


def trained_tokenizer(
    config: DataConfig, recipe: tuple, texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """A BPE from the cache, or trained.

    Args:
      config: the block ``data``.
      recipe: what tells it from every other; what all of them depend on is added.
      texts: gives the texts to train it on.
    """
    recipe = (*recipe, tokenizers.SPLIT, tokenizers.hf.__version__)
    key = hashlib.sha256(repr(recipe).encode()).hexdigest()
    root = config.cache_path / "bpe"
    if found := cache.find(root, key):
        return tokenizers.load_saved(found)
    tokenizer = tokenizers.train_bpe(texts(), config.bpe_vocab_size)
    cache.put(root, key, tokenizer.save)
    return tokenizer


def dataset_fingerprint(corpus_fingerprint: str, tokenizer: Tokenizer) -> str:
    """SHA-256 over a corpus with its split and a tokenizer."""
    return hashlib.sha256(f"{corpus_fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()


def target_counts(flat: np.ndarray, vocab_size: int) -> Int64[np.ndarray, " V"]:
    """How often each id is a target in a flat sequence: its first separator is an input only."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(1, len(flat), 2**24):  # bincount makes an int64 copy of what it counts
        counts += np.bincount(flat[start : start + 2**24], minlength=vocab_size)
    return counts


def tokenise(
    config: DataConfig, corpus: splits.SplitCorpus, tokenizer: Tokenizer, key: str
) -> list[store.MemoryStore]:
    """Training and held-out text as flat sequences in memory, from the cache where it has them.

    Args:
      config: the block ``data``.
      corpus: the text.
      tokenizer: the tokenizer.
      key: ``dataset_fingerprint`` of both, under which the cache keeps the tokens.
    """
    root = config.cache_path / "tokens"
    worthwhile = not isinstance(tokenizer, tokenizers.BytesTokenizer)
    found = cache.find(root, key) if worthwhile else None
    if found:
        return [
            store.MemoryStore(np.load(found / f"{split}.npy"), np.load(found / f"{split}_len.npy"))
            for split in ("train", "validation")
        ]
    stores = [
        store.encode_all(corpus.texts(split), tokenizer)
        for split in (splits.TRAIN, splits.VALIDATION)
    ]

    def write(folder: pathlib.Path) -> None:
        for split, tokens in zip(("train", "validation"), stores, strict=True):
            np.save(folder / f"{split}.npy", tokens.flat)
            np.save(folder / f"{split}_len.npy", tokens.lengths)

    if worthwhile:
        cache.put(root, key, write)
    return stores


def check_vocabulary(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError where a model has fewer ids than the tokenizer."""
    ids, where = tokenizer.vocab_size, f"the tokenizer (data.tokenizer {config.tokenizer!r})"
    if config.source == "shards":
        where = f"the tokenizer in {config.path}"
    elif any(source.source == "shards" for source in config.mixture):
        where = "the tokenizer of data.mixture's shards"
    remedy = f"{where} has {ids} ids; use {ids} or more, or a smaller tokenizer"
    config_lib.check(ids <= vocab_size, "model.vocab_size", vocab_size, remedy)


def check_long_enough(dataset: TextDataset, seq_len: int, of_source: str = "") -> None:
    """Raises ConfigError where the training text is shorter than one sequence."""
    config_lib.check(
        dataset.train_tokens >= seq_len,
        "train.seq_len",
        seq_len,
        f"the training text{of_source} has only {dataset.train_tokens} tokens, shorter than one "
        "sequence; give more text or use shorter sequences",
    )


def provenance_of(corpus: splits.SplitCorpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """The corpus's account of itself, with a warning where the tokenizer loses some of its text.

    That is tried on the beginnings of some held-out documents.
    """
    samples = [text[:10_000] for text in corpus.validation_texts[:10]]
    if all(tokenizer.decode(tokenizer.encode(text)) == text for text in samples):
        return corpus.provenance
    warning = (
        "the tokenizer does not give the text back as it was; bits per byte count bytes that it "
        "loses, and compare with no other tokenizer's"
    )
    return {**corpus.provenance, "warning": warning}


def text_dataset(
    config: DataConfig, corpus: splits.SplitCorpus, tokenizer: Tokenizer, seq_len: int
) -> TextDataset:
    """A corpus as packed rows, tokenised or from the cache."""
    fingerprint = dataset_fingerprint(corpus.fingerprint, tokenizer)
    train, validation = tokenise(config, corpus, tokenizer, fingerprint)
    held_out = "".join(corpus.validation_texts).encode()
    return TextDataset(
        tokenizer=tokenizer,
        train=Rows(train, seq_len),
        validation=Rows(validation, seq_len),
        train_bytes=corpus.train_bytes,
        validation_bytes=corpus.validation_bytes,
        fingerprint=fingerprint,
        provenance=provenance_of(corpus, tokenizer),
        train_counts=target_counts(train.flat, tokenizer.vocab_size),
        validation_counts=target_counts(validation.flat, tokenizer.vocab_size),
        gzip_bytes=baselines_lib.gzip_bytes(held_out),
    )


def open_dataset(
    config: DataConfig, *, seq_len: int, vocab_size: int, train_required: bool = True
) -> TextDataset:
    """Opens a config's text as packed rows.

    Args:
      config: the block ``data``.
      seq_len: S, positions of a row.
      vocab_size: of the model; it may be larger than the tokenizer's, never smaller.
      train_required: whether training text shorter than one sequence is refused.

    Raises:
      ConfigError: a corpus that is missing, empty, binary, too large or too short, or a tokenizer
        that is broken or has more ids than ``vocab_size``.
    """
    config_lib.check(seq_len > 0, "train.seq_len", seq_len, "must be above zero")
    check = lambda tokenizer: check_vocabulary(config, tokenizer, vocab_size)
    if config.mixture:
        from moejax.data import mixture  # it builds upon this module

        dataset = mixture.open_mixture(config, seq_len, check_tokenizer=check)
    elif config.source == "shards":
        from moejax.data import pretokenize  # it builds upon this module

        dataset = pretokenize.open_shards(config.path, seq_len)
        check(dataset.tokenizer)
    elif config.source == "pairs":
        from moejax.data import pairs  # it builds upon this module

        return pairs.open_pairs(config, seq_len, check_tokenizer=check)
    elif config.source == "preferences":
        from moejax.data import preferences  # it builds upon this module

        return preferences.open_preferences(config, seq_len, check_tokenizer=check)
    else:
        corpus = split_of(config, config.max_bytes)
        tokenizer = choose_tokenizer(config, corpus)
        check(tokenizer)
        dataset = text_dataset(config, corpus, tokenizer, seq_len)
    if train_required:
        check_long_enough(dataset, seq_len)
    return dataset
