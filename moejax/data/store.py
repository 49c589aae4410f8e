"""Where tokens lie: one flat sequence of ids with a separator before, between and after documents.

``sep a a a sep b b sep``: document ``d`` owns the pairs from its leading separator on, and its last
target is the separator that leads the next one. Both stores, memory and ArrayRecord shards, answer
``read(start, stop)`` on that sequence, so packing and the input pipeline know only one.
"""

import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int, Int64

from moejax import config
from moejax.data.tokenizers import Tokenizer


class TokenStore(Protocol):
    """Random access to the flat sequence of one split."""

    lengths: Int64[np.ndarray, " documents"]  # pairs of each document: its ids plus one

    def read(self, start: int, stop: int) -> Int[np.ndarray, " stop-start"]:
        """Ids ``start .. stop`` of the flat sequence."""


class MemoryStore:
    """The flat sequence as one array in memory (or mapped from a file)."""

    def __init__(self, flat: Int[np.ndarray, " N"], lengths: Int64[np.ndarray, " documents"]):
        self.flat, self.lengths = flat, lengths

    def read(self, start: int, stop: int) -> Int[np.ndarray, " stop-start"]:
        return self.flat[start:stop]


class ShardStore:
    """The flat sequence in ArrayRecord shards, as records of ``record_tokens`` ids each."""

    def __init__(
        self,
        paths: Sequence[str],
        lengths: Int64[np.ndarray, " documents"],
        record_tokens: int,
        dtype: np.dtype,
    ):
        self.lengths, self.record_tokens, self.dtype = lengths, record_tokens, dtype
        self._paths = list(paths)

    @functools.cached_property
    def _records(self) -> Sequence[bytes]:
        import grain  # slow to import, and only shards need it here

        return grain.sources.ArrayRecordDataSource(self._paths)

    def read(self, start: int, stop: int) -> Int[np.ndarray, " stop-start"]:
        """As in memory; raises UserError on a record that ArrayRecord finds damaged."""
        first, last = start // self.record_tokens, (stop - 1) // self.record_tokens
        try:
            records = [self._records[i] for i in range(first, last + 1)]
        except RuntimeError as error:
            folder = pathlib.Path(self._paths[0]).parent
            reason = str(error).splitlines()[0][:120]
            raise config.UserError(
                f"{folder}: damaged ({reason}); write the shards again"
            ) from error
        parts = [np.frombuffer(record, self.dtype) for record in records]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        offset = first * self.record_tokens
        return joined[start - offset : stop - offset]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest stored type for ids below ``vocab_size``, little-endian."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")


def batches_of_text(documents: Iterable[str], characters: int = 4_000_000) -> Iterable[list[str]]:
    """Groups documents into lists of about so many characters, in order."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(documents: Iterable[str], tokenizer: Tokenizer) -> MemoryStore:
    """Tokenises documents into memory.

    Args:
      documents: texts, in corpus order.
      tokenizer: the tokenizer; its ids are kept in 2 bytes where they fit.

    Returns:
      The store; no documents give an empty one.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator], dtype)
    parts, lengths = [separator], []
    for batch in batches_of_text(documents):
        for ids in tokenizer.encode_batch(batch):
            parts += [ids.astype(dtype), separator]
            lengths.append(len(ids) + 1)
    return MemoryStore(np.concatenate(parts), np.array(lengths, np.int64))


def joined(stores: Sequence[TokenStore]) -> MemoryStore:
    """The documents of several stores, of one tokenizer, in order and in memory."""
    read = lambda tokens: tokens.read(0, int(tokens.lengths.sum()) + 1)
    # The separator at the end of one store is that at the beginning of the next.
    flats = [read(tokens)[1 if i else 0 :] for i, tokens in enumerate(stores)]
    return MemoryStore(np.concatenate(flats), np.concatenate([s.lengths for s in stores]))
