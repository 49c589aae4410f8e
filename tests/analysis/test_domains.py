"""Bits per byte by domain: by hand, and the intervals by simulation."""

import gzip
import math

import numpy as np
import pytest

from moejax.analysis import domains
from moejax.analysis.domains import Documents, by_domain, of_documents, ratio_interval
from moejax.analysis.held_out import Domains, HeldOut
from moejax.data import Rows
from moejax.data.store import MemoryStore
from moejax.data.tokenizers import BytesTokenizer

TEXTS = ["abcd", "ab", "éé"]


def held_out(of_document=(0, 1, 0)):
    names = Domains(("x", "y"), np.array(of_document), "top-level folder")
    return HeldOut(None, BytesTokenizer(), names, texts=TEXTS, train_counts=np.zeros(257, int))


def documents(seen, nats):
    sizes = np.array([4, 2, 4])
    unigram = np.array([4.0, 2, 8]) * math.log(2)
    return Documents(sizes + 1, sizes, np.array(seen), np.array(nats) * math.log(2), unigram)


def test_bits_per_byte_by_hand():
    found = by_domain(documents([5, 3, 5], [8.0, 1, 12]), held_out())
    # Domain x: 8 + 12 bits over 4 + 4 bytes; y: 1 bit over 2 bytes.
    x, y = found["domains"]
    assert (x["name"], x["documents"], x["tokens"], x["bytes"]) == ("x", 2, 10, 8)
    assert x["bits_per_byte"] == pytest.approx(2.5) and x["unigram"] == pytest.approx(1.5)
    assert x["nats_per_token"] == pytest.approx(2 * math.log(2))
    assert x["gzip"] == 8 * len(gzip.compress("abcdéé".encode(), 9, mtime=0)) / 8
    assert y["bits_per_byte"] == pytest.approx(0.5) and y["interval"] is None
    total = found["total"]
    assert total["bits_per_byte"] == pytest.approx(2.1) and total["documents"] == 3
    assert found["kind"] == "top-level folder" and found["why"] is None


def test_a_document_seen_in_part_counts_in_part():
    # Two of five targets of the first are 2/5 of its 4 bytes; the second was not run at all.
    found = of_documents(documents([2, 0, 5], [4.0, 0, 12]), np.ones(3, bool), held_out())
    assert found["documents"] == 2 and found["tokens"] == 7
    assert found["bits_per_byte"] == pytest.approx(16 / (1.6 + 4))
    # The baselines are those of the whole text.
    assert found["unigram"] == pytest.approx(1.4)
    unseen = by_domain(documents([2, 0, 5], [4.0, 0, 12]), held_out())
    assert [domain["name"] for domain in unseen["domains"]] == ["x"]


def test_unigram_nats_of_each_document():
    # sep a b sep a sep, counts a: 1, sep: 2, all others 0, smoothed over 257 + 3.
    store = MemoryStore(np.array([256, 97, 98, 256, 97, 256]), np.array([3, 2]))
    counts = np.bincount([97, 256, 256], minlength=257)
    cost = lambda times: math.log(260 / (times + 1))
    wanted = [cost(1) + cost(0) + cost(2), cost(1) + cost(2)]
    np.testing.assert_allclose(domains.unigram_nats(counts, store), wanted)


def test_the_interval_of_equal_units_is_that_of_a_mean():
    # Five of 2 bytes: ratios 1 2 3 4 5, deviation sqrt(2.5), t of 4 degrees 2.776.
    low, high = ratio_interval(np.array([2.0, 4, 6, 8, 10]), np.full(5, 2.0))
    reach = 2.776445 * math.sqrt(2.5 / 5)
    assert (low, high) == pytest.approx((3 - reach, 3 + reach), rel=1e-6)
    assert ratio_interval(np.ones(1), np.ones(1)) is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    # Documents of unequal length whose bits per byte vary and lean on the length: the truth is the
    # ratio of expectations.
    rng = np.random.default_rng(0)
    draw = lambda count: (lambda sizes: (
        sizes * (2 + 0.3 * rng.normal(size=count)) - 20 * np.log(sizes), sizes
    ))(rng.gamma(3, 200, count) + 50)  # fmt: skip
    bits, sizes = draw(2_000_000)
    truth = bits.sum() / sizes.sum()
    hits = [low <= truth <= high for low, high in (ratio_interval(*draw(15)) for _ in range(2000))]
    assert 0.93 < np.mean(hits) < 0.97


def test_batches_are_summed_by_document(monkeypatch):
    """Each target costs its id: a document's nats are the sum of its ids, wherever they lie."""
    ids = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
    flat = [0, *(i for text in ids for i in [*text, 0])]
    rows = Rows(MemoryStore(np.array(flat), np.array([len(text) + 1 for text in ids])), 4)

    class Costs:
        def __init__(self, batch):
            self.nll = np.where(batch["segment_ids"] > 0, batch["targets"], 0.0)

    monkeypatch.setattr(domains, "score", lambda config, variables, batch: Costs(batch))
    text = HeldOut(rows, None, None, "one folder", ["x" * 5, "é", ""], np.zeros(10, int))
    found, count = domains.run(None, {}, text, batch_size=2, max_batches=None)
    assert count == -(-len(rows) // 2)
    np.testing.assert_array_equal(found.nats, [14, 11, 43])
    np.testing.assert_array_equal(found.seen, [6, 3, 8])
    np.testing.assert_array_equal(found.targets, [6, 3, 8])
    np.testing.assert_array_equal(found.bytes, [5, 2, 0])
    _, count = domains.run(None, {}, text, batch_size=2, max_batches=1)
    assert count == 1
