"""What is held out, decided by hashes; and the fingerprint of a corpus with its split.

A corpus goes through three hands: ``draft`` reads it once and assigns each document,
``drop_held_out`` keeps the held-out text of one source of a mixture out of the others' training
text, and ``finish`` fingerprints what came of it. ``split_corpus`` is all that for one source.
"""

import array
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int8, UInt64

from moejax import config
from moejax.data.documents import Corpus
from moejax.data.duplicates import Digests, Seen

UNUSED, TRAIN, VALIDATION = 0, 1, 2
_CODES = {None: UNUSED, "train": TRAIN, "validation": VALIDATION}


@dataclasses.dataclass(frozen=True)
class SplitCorpus:
    """A corpus of which each document is assigned to training, to validation, or to neither.

    Attributes:
      corpus: the source.
      assigned: a code for each document, in order.
      train_bytes, validation_bytes: UTF-8 bytes of each split.
      fingerprint: of the texts in order and of what is held out.
      train_fingerprint: of the training texts in order.
    """

    corpus: Corpus
    assigned: Int8[np.ndarray, " documents"]
    train_bytes: int
    validation_bytes: int
    fingerprint: str
    train_fingerprint: str
    provenance: dict[str, Any]

    def texts(self, split: int) -> Iterator[str]:
        """The texts of TRAIN or VALIDATION in corpus order; training text is read again each time.

        Raises:
          UserError: the corpus is no longer what it was when it was opened.
        """
        return iter(self.validation_texts) if split == VALIDATION else self._read(split)

    @functools.cached_property
    def validation_texts(self) -> list[str]:
        """The held-out texts, kept in memory."""
        return list(self._read(VALIDATION))

    def _read(self, split: int) -> Iterator[str]:
        documents = (document for document in self.corpus.read() if document.text)
        for code in self.assigned.tolist():
            document = next(documents, None)
            if document is None:
                raise config.UserError("the corpus changed while it was read; start again")
            if code == split:
                yield document.text


def held_out(
    keys: UInt64[np.ndarray, " documents"],
    groups: UInt64[np.ndarray, " documents"],
    sizes: Int[np.ndarray, " documents"],
    budget: int,
) -> Bool[np.ndarray, " documents"]:
    """Chooses the documents to hold out, by hash and not by order.

    Documents of the same content go together, by their smallest key. Taken in the order of keys
    are those that still fit the budget, until nine tenths of it are full; where none fits, the
    smallest.

    Args:
      keys: a hash of each document's path or content.
      groups: a hash of each document's content.
      sizes: bytes.
      budget: bytes to hold out at most.

    Returns:
      True for the documents that are held out.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    group_sizes = np.bincount(inverse, weights=sizes).astype(np.int64)
    group_keys = np.full(len(group_sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(group_keys, inverse, keys)
    chosen = np.zeros(len(group_sizes), bool)
    filled = 0
    order = np.argsort(group_keys, kind="stable")
    for group, size in zip(order.tolist(), group_sizes[order].tolist(), strict=True):
        if filled + size <= budget:
            chosen[group] = True
            filled += size
            if filled >= 0.9 * budget:
                break
    if not filled:
        chosen[np.argmin(group_sizes)] = True
    return chosen[inverse]


def validation_budget(total_bytes: int, fraction: float, max_bytes: int) -> int:
    """Bytes to hold out of so many: a fraction of them, no more than the maximum, at least one."""
    return max(1, min(int(total_bytes * fraction), max_bytes))


@dataclasses.dataclass
class _Scan:
    """What one pass over a corpus finds: four numbers a document, 25 bytes; with digests, 57."""

    keys: array.array = dataclasses.field(default_factory=lambda: array.array("Q"))
    groups: array.array = dataclasses.field(default_factory=lambda: array.array("Q"))
    sizes: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    given: array.array = dataclasses.field(default_factory=lambda: array.array("b"))
    digests: Digests | None = None


def hash_of(content: bytes) -> int:
    """The first 64 bits of a SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _scan(corpus: Corpus, max_bytes: int | None, with_digests: bool) -> _Scan:
    found, total = _Scan(digests=Digests() if with_digests else None), 0
    for document in corpus.read():
        if not document.text:
            continue
        raw = document.text.encode()
        content = hash_of(raw)
        found.groups.append(content)
        found.keys.append(content if document.key is None else hash_of(document.key.encode()))
        found.sizes.append(len(raw))
        found.given.append(_CODES[document.split])
        if found.digests is not None:
            found.digests.add(document.text)
        total += len(raw)
        check_size(total, max_bytes)
    return found


def check_size(total: int, max_bytes: int | None) -> None:
    """Raises ConfigError where a corpus, or a mixture, has more bytes than may be in memory."""
    if max_bytes is not None and total > max_bytes:
        raise config.ConfigError(
            "data.max_bytes",
            max_bytes,
            "the corpus is larger than may be tokenised in memory; run `moejax tokenize` "
            "on this config, and train with data.source 'shards' on what it writes",
        )


@dataclasses.dataclass
class Draft:
    """A corpus that was read once, with each document assigned; arrays as in ``SplitCorpus``.

    ``provenance`` holds what there is to say of documents that were dropped.
    """

    corpus: Corpus
    assigned: Int8[np.ndarray, " documents"]
    groups: UInt64[np.ndarray, " documents"]
    sizes: Int[np.ndarray, " documents"]
    where: tuple[str, str]  # the field that names the corpus, and its value
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def held_out_groups(self) -> UInt64[np.ndarray, " held_out"]:
        """Hashes of the held-out documents' content."""
        return self.groups[self.assigned == VALIDATION]

    def check_both_splits(self) -> None:
        """Raises ConfigError where training or validation has no document."""
        for code, name in ((TRAIN, "training"), (VALIDATION, "validation")):
            remedy = f"leaves no text for {name}; give more text"
            config.check(bool((self.assigned == code).any()), *self.where, remedy)


def split_corpus(
    corpus: Corpus,
    fraction: float,
    max_validation_bytes: int,
    max_bytes: int | None = None,
    seen: Seen | None = None,
) -> SplitCorpus:
    """Reads a corpus once and decides what is held out: ``draft`` and ``finish``."""
    return finish(draft(corpus, fraction, max_validation_bytes, max_bytes, seen))


def draft(
    corpus: Corpus,
    fraction: float,
    max_validation_bytes: int,
    max_bytes: int | None = None,
    seen: Seen | None = None,
) -> Draft:
    """Reads a corpus once and assigns its documents; empty ones are left out.

    Where the source has splits of its own they stay, the validation split is cut to
    ``max_validation_bytes`` by hash, and training documents that equal a validation document are
    dropped, so that validation text is never seen in training.

    Args:
      corpus: the source.
      fraction: share of the bytes to hold out.
      max_validation_bytes: hold out no more bytes.
      max_bytes: refuse a larger corpus; None takes any.
      seen: documents of sources before this one; equal ones here, and second copies, are dropped,
        and what stays is added. None drops none.

    Raises:
      ConfigError: no text, too much of it, or not enough documents to hold one out.
    """
    found = _scan(corpus, max_bytes, seen is not None)
    name = corpus.provenance.get("path") or corpus.provenance.get("name") or "stdlib"
    where = ("data.path" if corpus.provenance.get("path") else "data.source", name)
    config.check(bool(found.sizes), *where, "holds no text at all; give some")
    sizes, assigned = np.array(found.sizes, np.int64), np.array(found.given, np.int8)
    keys, groups = np.array(found.keys, np.uint64), np.array(found.groups, np.uint64)
    result = Draft(corpus, assigned, groups, sizes, where)
    own_splits = bool(assigned.any())
    here = np.ones(len(sizes), bool)
    if seen is not None:
        here = seen.first_copies(found.digests.array(), first=assigned == VALIDATION)
        result.provenance = {
            "duplicate_documents": int((~here).sum()),
            "duplicate_bytes": int(sizes[~here].sum()),
        }
        remedy = "holds nothing but documents that sources before it have; leave it out"
        config.check(bool(here.any()), *where, remedy)
        assigned[~here] = UNUSED
    if own_splits:
        _cut_validation(assigned, keys, groups, sizes, max_validation_bytes)
        result.check_both_splits()
        return result
    kept = np.flatnonzero(here)
    budget = validation_budget(int(sizes[kept].sum()), fraction, max_validation_bytes)
    out = held_out(keys[kept], groups[kept], sizes[kept], budget)
    assigned[kept] = np.where(out, VALIDATION, TRAIN)
    config.check(
        bool((assigned == TRAIN).any()),
        *where,
        "holds a single document, or copies of one; give two different ones at least, "
        "so that one can be held out",
    )
    return result


def drop_held_out(draft: Draft, groups: Sequence[UInt64[np.ndarray, " _"]]) -> None:
    """Drops training documents that equal one that some source of the mixture holds out, in place.

    Args:
      draft: of one source.
      groups: ``held_out_groups`` of every source.

    Raises:
      ConfigError: the source is left without training text.
    """
    copies = np.isin(draft.groups, np.concatenate(groups)) & (draft.assigned == TRAIN)
    draft.assigned[copies] = UNUSED
    if copies.any():
        draft.provenance["copies_of_held_out_documents"] = int(copies.sum())
    draft.check_both_splits()


def _cut_validation(
    assigned: Int8[np.ndarray, " documents"],
    keys: UInt64[np.ndarray, " documents"],
    groups: UInt64[np.ndarray, " documents"],
    sizes: Int[np.ndarray, " documents"],
    max_validation_bytes: int,
) -> None:
    """Limits a given validation split, and drops its copies from training, in place."""
    given = np.flatnonzero(assigned == VALIDATION)
    if sizes[given].sum() > max_validation_bytes:
        kept = held_out(keys[given], groups[given], sizes[given], max_validation_bytes)
        assigned[given[~kept]] = UNUSED
    copies = np.isin(groups, groups[assigned == VALIDATION]) & (assigned == TRAIN)
    assigned[copies] = UNUSED


def finish(draft: Draft) -> SplitCorpus:
    """The corpus with its split, fingerprinted."""
    assigned, sizes = draft.assigned, draft.sizes
    train, validation = (
        hashlib.sha256(draft.groups[assigned == code].astype(">u8").tobytes())
        for code in (TRAIN, VALIDATION)
    )
    counts = {
        "documents": len(sizes),
        "bytes": int(sizes.sum()),
        "train_documents": int((assigned == TRAIN).sum()),
        "validation_documents": int((assigned == VALIDATION).sum()),
        "unused_documents": int((assigned == UNUSED).sum()),
    }
    return SplitCorpus(
        corpus=draft.corpus,
        assigned=assigned,
        train_bytes=int(sizes[assigned == TRAIN].sum()),
        validation_bytes=int(sizes[assigned == VALIDATION].sum()),
        fingerprint=hashlib.sha256(train.digest() + validation.digest()).hexdigest(),
        train_fingerprint=train.hexdigest(),
        provenance={**draft.corpus.provenance, **counts, **draft.provenance},
    )
