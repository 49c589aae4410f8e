"""Packing: every token a target exactly once, in rows of S, whatever the documents' lengths."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.packing import Rows, best_fit_decreasing, make_plan, padding_row
from moejax.data.store import MemoryStore

SEPARATOR = 10_000


def _rows(documents, seq_len):
    """Rows over documents given as lists of ids."""
    flat = [SEPARATOR]
    for ids in documents:
        flat += [*ids, SEPARATOR]
    lengths = np.array([len(ids) + 1 for ids in documents], np.int64)
    return Rows(MemoryStore(np.array(flat, np.uint16), lengths), seq_len)


def test_two_documents_by_hand():
    # Documents 1 2 3 and 4, S = 4. As sequences: # 1 2 3 # and # 4 #.
    #   inputs  # 1 2 3 | # 4        targets 1 2 3 # | 4 #
    # The first has four pairs and fills a row; the second has two, and two positions of padding.
    rows = _rows([[1, 2, 3], [4]], 4)
    assert len(rows) == 2
    assert rows.targets == 6
    assert rows.fill == 6 / 8
    first, second = rows[0], rows[1]
    assert first["tokens"].tolist() == [SEPARATOR, 1, 2, 3]
    assert first["targets"].tolist() == [1, 2, 3, SEPARATOR]
    assert first["segment_ids"].tolist() == [1, 1, 1, 1]
    assert first["positions"].tolist() == [0, 1, 2, 3]
    assert second["tokens"].tolist() == [SEPARATOR, 4, 0, 0]
    assert second["targets"].tolist() == [4, SEPARATOR, 0, 0]
    assert second["segment_ids"].tolist() == [1, 1, 0, 0]
    assert second["positions"].tolist() == [0, 1, 0, 0]


def test_a_long_document_is_cut_without_losing_the_target_at_the_cut():
    # # 1 2 3 4 # with S = 3: inputs # 1 2 | 3 4, targets 1 2 3 | 4 #.
    rows = _rows([[1, 2, 3, 4]], 3)
    assert [rows[i]["tokens"].tolist() for i in range(2)] == [[SEPARATOR, 1, 2], [3, 4, 0]]
    assert [rows[i]["targets"].tolist() for i in range(2)] == [[1, 2, 3], [4, SEPARATOR, 0]]
    assert rows[1]["positions"].tolist() == [0, 1, 0]


def test_short_documents_share_a_row_as_segments():
    rows = _rows([[1], [2], [3]], 6)
    assert len(rows) == 1
    assert rows[0]["segment_ids"].tolist() == [1, 1, 2, 2, 3, 3]
    assert rows[0]["positions"].tolist() == [0, 1, 0, 1, 0, 1]


def test_best_fit_by_hand():
    # Room 10; longest first: 7 | 6 | 4 goes with the 6 (room 4, not 3) | 3 with the 7.
    assert best_fit_decreasing(np.array([4, 7, 3, 6]), 10).tolist() == [1, 0, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    seq_len=st.integers(1, 17),
)
def test_every_pair_of_every_document_exactly_once(lengths, seq_len):
    # Ids are unique over the corpus, so a pair (input, target) says where it is from.
    ids = iter(range(1, 10_000))
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    rows = _rows(documents, seq_len)
    expected = []
    for document in documents:
        sequence = [SEPARATOR, *document, SEPARATOR]
        expected += list(itertools.pairwise(sequence))
    found = []
    for i in range(len(rows)):
        row = rows[i]
        assert {name: v.shape for name, v in row.items()} == dict.fromkeys(row, (seq_len,))
        assert {v.dtype for v in row.values()} == {np.dtype(np.int32)}
        real = row["segment_ids"] > 0
        found += list(zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True))
        assert not any(v[~real].any() for v in row.values())
        assert sorted(set(row["segment_ids"][real].tolist())) == list(
            range(1, row["segment_ids"].max() + 1)
        )
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            assert row["positions"][here].tolist() == list(range(here.sum()))
            tokens, targets = row["tokens"][here], row["targets"][here]
            assert tokens[1:].tolist() == targets[:-1].tolist()  # a piece is contiguous
            assert not (targets[:-1] == SEPARATOR).any()  # and of one document
    assert sorted(found) == sorted(expected)
    assert rows.targets == len(expected)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), max_size=60))
def test_no_bin_overflows_and_at_most_one_is_half_empty(sizes):
    bins = best_fit_decreasing(np.array(sizes, np.int64), 50)
    filled = np.bincount(bins, weights=sizes) if sizes else np.zeros(0)
    assert (filled <= 50).all()
    assert (filled > 0).all()
    assert (filled <= 25).sum() <= 1  # two such bins would have been one


def test_a_plan_is_deterministic_and_fills_rows_of_a_realistic_corpus():
    lengths = np.random.default_rng(0).integers(1, 700, 3000)
    plan, again = make_plan(lengths, 256), make_plan(lengths, 256)
    assert all((a == b).all() for a, b in zip(plan, again, strict=True))
    rows = len(plan.row_starts) - 1
    assert lengths.sum() / (rows * 256) > 0.97


def test_a_row_that_does_not_exist():
    rows = _rows([[1]], 4)
    for index in (-1, 1):
        with pytest.raises(IndexError, match="of 1"):
            rows[index]


def test_padding_row_counts_for_nothing():
    assert all(not v.any() and v.dtype == np.int32 for v in padding_row(3).values())
