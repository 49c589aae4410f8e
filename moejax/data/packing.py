"""Documents packed into rows of S tokens, exactly: every token is a target once, none is lost.

A document with ids ``x1 .. xn`` is the sequence ``sep x1 .. xn sep``; its inputs are all but the
last and its targets all but the first, so every token and the document's end is predicted once.
The n + 1 (input, target) pairs are cut into pieces of at most S. A piece of S pairs is a row of its
own; shorter ones are packed several to a row, best fit in decreasing length. The plan is made once,
from the lengths alone, so it is the same whichever store holds the tokens.
"""

import collections
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64

from moejax.data.store import TokenStore

Row = dict[str, Int32[np.ndarray, " S"]]


class Plan(NamedTuple):
    """Which pieces make up which row.

    Piece ``p`` takes the pairs ``starts[p] .. starts[p] + sizes[p]`` of the token store's flat
    sequence; row ``r`` holds the pieces ``row_starts[r] .. row_starts[r + 1]``.
    """

    starts: Int64[np.ndarray, " P"]
    sizes: Int32[np.ndarray, " P"]
    row_starts: Int64[np.ndarray, " rows+1"]


def cut(
    lengths: Int[np.ndarray, " documents"], seq_len: int
) -> tuple[Int64[np.ndarray, " P"], Int32[np.ndarray, " P"]]:
    """Cuts documents into pieces of at most ``seq_len`` (input, target) pairs.

    Args:
      lengths: pairs of each document, its number of ids plus one.
      seq_len: S.

    Returns:
      Where each piece starts in the flat sequence, and how many pairs it has.
    """
    lengths = np.asarray(lengths, np.int64)
    pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces)
    first_piece = np.cumsum(pieces) - pieces
    offset = (np.arange(len(document)) - first_piece[document]) * seq_len
    document_start = np.cumsum(lengths) - lengths
    sizes = np.minimum(lengths[document] - offset, seq_len)
    return document_start[document] + offset, sizes.astype(np.int32)


def best_fit_decreasing(sizes: Int[np.ndarray, " P"], seq_len: int) -> Int64[np.ndarray, " P"]:
    """The bin of each piece: longest first, each into the fullest bin that still has room.

    Bins are found by the room they have left, with one bit for each amount of room that some bin
    has, so a million pieces take about a second. Deterministic: equal pieces keep their order.

    Args:
      sizes: between 1 and ``seq_len``.
      seq_len: capacity of a bin.

    Returns:
      Bin numbers from 0 without gaps.
    """
    bins = np.empty(len(sizes), np.int64)
    order = np.argsort(-np.asarray(sizes, np.int64), kind="stable")
    ordered = np.asarray(sizes)[order]
    full = int(np.searchsorted(-ordered, -seq_len, side="right"))
    bins[order[:full]] = np.arange(full)
    with_room: dict[int, list[int]] = collections.defaultdict(list)
    rooms, count, chosen = 0, full, []
    for size in ordered[full:].tolist():
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            bin_ = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, bin_, count = seq_len, count, count + 1
        chosen.append(bin_)
        left = room - size
        if left:
            with_room[left].append(bin_)
            rooms |= 1 << left
    bins[order[full:]] = chosen
    return bins


def make_plan(lengths: Int[np.ndarray, " documents"], seq_len: int) -> Plan:
    """Plans the rows of a corpus from its documents' lengths (ids plus one); deterministic.

    Rows follow the corpus: they are ordered by their earliest piece.
    """
    return plan_of(*cut(lengths, seq_len), seq_len)


def plan_of(starts: Int64[np.ndarray, " P"], sizes: Int32[np.ndarray, " P"], seq_len: int) -> Plan:
    """Plans the rows of pieces, each of at most ``seq_len`` pairs; see ``make_plan``."""
    # A row that all of the text fits in need not be longer: every bit of a row's room is tried.
    bins = best_fit_decreasing(sizes, min(seq_len, int(sizes.sum())))
    # Pieces come in corpus order, so the first piece of a bin is its earliest.
    _, first, inverse = np.unique(bins, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    rows = rank[inverse]
    order = np.argsort(rows, kind="stable")
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(first)))])
    return Plan(starts[order], sizes[order], row_starts.astype(np.int64))


class Rows:
    """The packed rows of one split, by random access; reading a row touches its tokens only.

    Attributes:
      seq_len: S.
      targets: (input, target) pairs in all rows together, the tokens of one epoch.
      counted: those of them that a loss counts: all.
      weighted: a row has ``weights``, of its targets in the loss.
    """

    weighted = False

    def __init__(self, store: TokenStore, seq_len: int):
        self.store, self.seq_len = store, seq_len
        self.plan = self._make_plan()
        self.targets = self.counted = int(self.plan.sizes.sum())

    def _make_plan(self) -> Plan:
        return make_plan(self.store.lengths, self.seq_len)

    def __len__(self) -> int:
        return len(self.plan.row_starts) - 1

    @property
    def fill(self) -> float:
        """Share of the positions of all rows that hold a target; the rest is padding."""
        return self.targets / max(1, len(self) * self.seq_len)

    @property
    def tokens_per_row(self) -> float:
        """Targets of a row, on the average."""
        return self.targets / max(1, len(self))

    def __getitem__(self, index: int) -> Row:
        """Row ``index``.

        Returns:
          ``tokens``, ``targets``, ``segment_ids`` (0 is padding, pieces are numbered from 1) and
          ``positions`` (from 0 in each piece), each (S,) int32; zeros where there is padding.

        Raises:
          IndexError: no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = {
            name: np.zeros(self.seq_len, np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions")
        }
        at = 0
        first, last = self.plan.row_starts[index], self.plan.row_starts[index + 1]
        for segment, piece in enumerate(range(first, last), start=1):
            start, size = int(self.plan.starts[piece]), int(self.plan.sizes[piece])
            pairs = self.store.read(start, start + size + 1)
            row["tokens"][at : at + size] = pairs[:-1]
            row["targets"][at : at + size] = pairs[1:]
            row["segment_ids"][at : at + size] = segment
            row["positions"][at : at + size] = np.arange(size)
            at += size
        return row


def padding_row(seq_len: int, weighted: bool = False) -> Row:
    """A row of padding only: all zeros, which no loss counts; with ``weights`` where asked for."""
    names = ("tokens", "targets", "segment_ids", "positions")
    row = {name: np.zeros(seq_len, np.int32) for name in names}
    return {**row, "weights": np.zeros(seq_len, np.float32)} if weighted else row
