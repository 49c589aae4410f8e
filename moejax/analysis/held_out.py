"""A run's held-out text again, with the document of every token: what routers are judged on."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from moejax.config import ConfigError
from moejax.data import DataConfig, Rows, TextDataset, mixture, splits, store, tokenizers
from moejax.data.dataset import dataset_fingerprint, split_of, target_counts, tokenise
from moejax.data.packing import Row, padding_row
from moejax.data.tokenizers import Tokenizer

TOP_LEVEL, OTHERS = "(top level)", "(others)"
MOST_DOMAINS = 12


@dataclasses.dataclass(frozen=True)
class Domains:
    """What kinds of text the held-out documents are.

    Attributes:
      names: of the domains.
      of_document: domain of each held-out document, in corpus order.
      kind: what sets the domains apart, for people.
    """

    names: tuple[str, ...]
    of_document: Int[np.ndarray, " documents"]
    kind: str


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out text.

    Attributes:
      rows: the packed rows.
      tokenizer: text to ids and back.
      domains: None where the corpus does not tell them.
      why: the reason for that.
      texts: of the documents, where they were asked for; of shards, what their tokens spell.
      train_counts: how often each id is a target in training, where it was asked for.
    """

    rows: Rows
    tokenizer: Tokenizer
    domains: Domains | None
    why: str = ""
    texts: Sequence[str] = ()
    train_counts: Int64[np.ndarray, " V"] | None = None


def open_held_out(
    config: DataConfig, *, seq_len: int, tokenizer_folder: pathlib.Path, fingerprint: str,
    with_text: bool = False,
) -> HeldOut:  # fmt: skip
    """Opens the held-out part of a config's text.

    Args:
      config: the block ``data``.
      seq_len: S, positions of a row.
      tokenizer_folder: where the run saved its tokenizer.
      fingerprint: of the text that the run trained on.
      with_text: also give ``texts`` and ``train_counts``, for which the training text is tokenised,
        unless it was before; else it is only read.

    Raises:
      ConfigError: a corpus that is missing, or not the run's; of shards with text, a tokenizer that
        does not give the text back.
      UserError: a damaged tokenizer.
    """
    tokenizer = tokenizers.load_saved(tokenizer_folder)
    if config.mixture:
        return _open_mixture(config, seq_len, tokenizer, fingerprint, with_text)
    if config.source == "shards":
        from moejax.data import pretokenize  # only shards need ArrayRecord

        dataset = pretokenize.open_shards(config.path, seq_len)
        _check_fingerprint(config, dataset.fingerprint, fingerprint)
        found = HeldOut(dataset.validation, tokenizer, None, "shards hold no documents' names")
        if not with_text:
            return found
        texts = _spelled(dataset, config.path)
        return dataclasses.replace(found, texts=texts, train_counts=dataset.train_counts)
    corpus = split_of(config, config.max_bytes)
    found = dataset_fingerprint(corpus.fingerprint, tokenizer)
    _check_fingerprint(config, found, fingerprint)
    texts, counts = [], None
    if with_text:
        texts = corpus.validation_texts
        train, held_out = tokenise(config, corpus, tokenizer, found)
        counts = target_counts(train.flat, tokenizer.vocab_size)
    else:
        held_out = store.encode_all(corpus.texts(splits.VALIDATION), tokenizer)
    paths = _paths(corpus, config.path)
    domains = find_domains(paths) if paths else None
    why = "the held-out documents lie in one folder and are of one kind" if paths else (
        "the corpus gives its documents no paths"
    )  # fmt: skip
    rows = Rows(held_out, seq_len)
    return HeldOut(rows, tokenizer, domains, "" if domains else why, texts, counts)


def _open_mixture(
    config: DataConfig, seq_len: int, tokenizer: Tokenizer, fingerprint: str, with_text: bool
) -> HeldOut:
    """The held-out text of a mixture; its sources are its domains."""
    sources = mixture.open_sources(config, seq_len, config.max_bytes)
    _check_fingerprint(config, mixture.fingerprint(config, sources, tokenizer), fingerprint)
    stores, texts, counts = [], [], 0
    for source in sources:
        if source.shards is not None:
            stores.append(source.shards.validation.store)
            if with_text:
                texts += _spelled(source.shards, source.config.path)
                counts = counts + source.shards.train_counts
        elif with_text:
            found = source.open(tokenizer, seq_len)
            stores.append(found.validation.store)
            texts += source.corpus.validation_texts
            counts = counts + found.train_counts
        else:
            held_out = source.corpus.texts(splits.VALIDATION)
            stores.append(store.encode_all(held_out, tokenizer))
    numbers = np.repeat(np.arange(len(stores)), [len(tokens.lengths) for tokens in stores])
    domains = Domains(tuple(source.label for source in sources), numbers, "source of the mixture")
    rows = Rows(store.joined(stores), seq_len)
    return HeldOut(rows, tokenizer, domains, "", texts, counts if with_text else None)


def _check_fingerprint(config: DataConfig, found: str, wanted: str) -> None:
    if found != wanted:
        raise ConfigError(
            "data", config.shown,
            "the corpus is not the one that the run in --workdir was trained on; restore the text",
        )  # fmt: skip


def _spelled(dataset: TextDataset, path: str) -> list[str]:
    """The held-out documents of shards, decoded; refused where that is not the text they had."""
    tokens = dataset.validation.store
    ends = np.cumsum(tokens.lengths)
    # A document's first id is the separator before it.
    starts = ends - tokens.lengths + 1
    read = lambda start, end: tokens.read(start, end) if start < end else []
    texts = [dataset.tokenizer.decode(read(*ids)) for ids in zip(starts, ends, strict=True)]
    spelled = sum(len(text.encode()) for text in texts)
    if spelled != dataset.validation_bytes:
        raise ConfigError(
            "data.path", path,
            f"the tokens of its held-out text spell {spelled:,} of {dataset.validation_bytes:,} "
            "bytes, so that bits per byte cannot be told; evaluate a run on the text itself",
        )  # fmt: skip
    return texts


def _paths(corpus: splits.SplitCorpus, path: str) -> list[str]:
    """Path of each held-out document within its corpus; empty where one has none."""
    documents = (document for document in corpus.corpus.read() if document.text)
    root, paths = f"{pathlib.Path(path).expanduser()}/", []
    for code, document in zip(corpus.assigned.tolist(), documents, strict=False):
        if code != splits.VALIDATION:
            continue
        if document.key is not None:
            paths.append(document.key.split("\n")[0])
        elif path and document.name.startswith(root):
            # A record of a file: its name is the file's path and its number there.
            paths.append(document.name.removeprefix(root).rsplit(":", 1)[0])
        else:
            return []
    return paths


def find_domains(paths: list[str]) -> Domains | None:
    """Domains by top-level folder, else by file kind; None where all documents are alike in both.

    The rarest beyond ``MOST_DOMAINS`` are taken together.
    """
    top = lambda path: path.split("/")[0] if "/" in path else TOP_LEVEL
    suffix = lambda path: pathlib.PurePosixPath(path).suffix or "(none)"
    for kind, name_of in (("top-level folder", top), ("file kind", suffix)):
        names = [name_of(path) for path in paths]
        ordered = [name for name, _ in collections.Counter(sorted(names)).most_common()]
        if len(ordered) < 2:
            continue
        if len(ordered) > MOST_DOMAINS:
            kept = ordered[: MOST_DOMAINS - 1]
            names = [name if name in kept else OTHERS for name in names]
            ordered = [*kept, OTHERS]
        return Domains(tuple(ordered), np.array([ordered.index(name) for name in names]), kind)
    return None


def batches(rows: Rows, *, batch_size: int, max_batches: int) -> Iterator[dict[str, Any]]:
    """Held-out batches, evenly spread over the rows, each row once.

    Args:
      rows: packed held-out rows.
      batch_size: B.
      max_batches: batches at most.

    Yields:
      ``tokens``, ``targets``, ``segment_ids``, ``positions`` and ``documents`` (number of each
      token's document, -1 for padding), (B, S) int32; the last batch may end in rows of padding.
    """
    count = -(-len(rows) // batch_size)
    taken = min(count, max_batches)
    # The rows in order are alike in length and document, so a sample has to be spread.
    for first in (i * count // taken * batch_size for i in range(taken)):
        numbers = range(first, first + batch_size)
        found = [_row(rows, i) if i < len(rows) else _padding(rows.seq_len) for i in numbers]
        yield {name: np.stack([row[name] for row in found]) for name in found[0]}


def _row(rows: Rows, index: int) -> Row:
    plan = rows.plan
    pieces = slice(plan.row_starts[index], plan.row_starts[index + 1])
    ends = np.cumsum(rows.store.lengths)
    numbers = np.searchsorted(ends, plan.starts[pieces], side="right")
    documents = np.full(rows.seq_len, -1, np.int32)
    filled = np.repeat(numbers, plan.sizes[pieces])
    documents[: len(filled)] = filled
    return {**rows[index], "documents": documents}


def _padding(seq_len: int) -> Row:
    return {**padding_row(seq_len), "documents": np.full(seq_len, -1, np.int32)}
