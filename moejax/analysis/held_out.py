"""A run's held-out text again, with the document of every token: what routers are judged on."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from moejax.config import ConfigError
from moejax.data import DataConfig, Rows, splits, store, tokenizers
from moejax.data.dataset import dataset_fingerprint, split_of
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
    """

    rows: Rows
    tokenizer: Tokenizer
    domains: Domains | None
    why: str = ""


def open_held_out(
    config: DataConfig, *, seq_len: int, tokenizer_folder: pathlib.Path, fingerprint: str
) -> HeldOut:
    """Opens the held-out part of a config's text; training text is read, but not tokenised.

    Args:
      config: the block ``data``.
      seq_len: S, positions of a row.
      tokenizer_folder: where the run saved its tokenizer.
      fingerprint: of the text that the run trained on.

    Raises:
      ConfigError: a corpus that is missing, or not the run's.
      UserError: a damaged tokenizer.
    """
    tokenizer = tokenizers.load_saved(tokenizer_folder)
    if config.source == "shards":
        from moejax.data import pretokenize  # only shards need ArrayRecord

        dataset = pretokenize.open_shards(config.path, seq_len)
        held_out = HeldOut(dataset.validation, tokenizer, None, "shards hold no documents' names")
        found = dataset.fingerprint
    else:
        corpus = split_of(config, config.max_bytes)
        found = dataset_fingerprint(corpus.fingerprint, tokenizer)
        texts = store.encode_all(corpus.texts(splits.VALIDATION), tokenizer)
        paths = _paths(corpus, config.path)
        domains = find_domains(paths) if paths else None
        why = "the held-out documents lie in one folder and are of one kind" if paths else (
            "the corpus gives its documents no paths"
        )  # fmt: skip
        held_out = HeldOut(Rows(texts, seq_len), tokenizer, domains, "" if domains else why)
    if found != fingerprint:
        raise ConfigError(
            "data", config.path or config.source,
            "the corpus is not the one that the run in --workdir was trained on; restore the text",
        )  # fmt: skip
    return held_out


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
