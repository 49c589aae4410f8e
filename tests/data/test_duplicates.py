"""Documents that occur more than once: dropped within a source, across sources and splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.data import splits
from moejax.data.documents import Corpus, Document
from moejax.data.duplicates import Digests, Seen
from moejax.data.splits import TRAIN, UNUSED, VALIDATION, split_corpus


def _corpus(*documents):
    return Corpus(lambda: iter(documents), {"source": "test", "path": "here"})


def _records(*texts, split=None):
    return [Document(text, f"record {i}", split=split) for i, text in enumerate(texts)]


def _digests(*texts):
    found = Digests()
    for text in texts:
        found.add(text)
    return found.array()


def _first(seen, *texts, held_out=()):
    first = np.array([i in held_out for i in range(len(texts))], bool)
    return seen.first_copies(_digests(*texts), first).tolist()


def test_white_space_at_the_end_makes_no_other_document():
    digests = _digests("a b", "a b \n\n", " a b", "a  b")
    assert digests[0] == digests[1]
    assert len(set(digests.tolist())) == 3
    assert digests.nbytes == 4 * 32


def test_the_first_one_stays_through_all_sources():
    seen = Seen()
    assert _first(seen, "x", "y", "x\n", "z") == [True, True, False, True]
    assert _first(seen, "w", "y ", "w") == [True, False, False]
    assert _first(seen, "w", "z") == [False, False]
    # What a source holds out itself goes before its training text.
    assert _first(Seen(), "x", "x", "y", held_out=(1,)) == [False, True, True]


@settings(max_examples=60, deadline=None)
@given(sources=st.lists(st.lists(st.text("ab \n", max_size=3), max_size=12), max_size=4))
def test_each_text_is_kept_once(sources):
    seen, kept = Seen(), []
    for texts in sources:
        kept += [t for t, own in zip(texts, _first(seen, *texts), strict=True) if own]
    expected = list(dict.fromkeys(text.rstrip() for texts in sources for text in texts))
    assert [text.rstrip() for text in kept] == expected


def test_a_corpus_without_its_copies():
    texts = [f"text number {i}" for i in range(50)]
    twice = split_corpus(_corpus(*_records(*texts, *(t + "\n" for t in texts[:7]))), 0.2, 10_000)
    once = split_corpus(
        _corpus(*_records(*texts, *(t + "\n" for t in texts[:7]))), 0.2, 10_000, seen=Seen()
    )
    plain = split_corpus(_corpus(*_records(*texts)), 0.2, 10_000)
    assert once.fingerprint == plain.fingerprint != twice.fingerprint
    assert list(once.texts(TRAIN)) == list(plain.texts(TRAIN))
    assert once.provenance["duplicate_documents"] == 7
    assert once.provenance["duplicate_bytes"] == sum(len(t) + 1 for t in texts[:7])
    assert once.provenance["unused_documents"] == 7
    assert "duplicate_documents" not in twice.provenance


def test_a_near_copy_of_held_out_text_is_no_training_text():
    # "held" has another hash with a line end, so only the deduplication sees that they are one.
    train = _records("a", "b", "held\n", "b", split="train")
    given = _corpus(*train, *_records("held", "c", "c ", split="validation"))
    split = split_corpus(given, 0.5, 100, seen=Seen())
    assert split.assigned.tolist() == [
        TRAIN, TRAIN, UNUSED, UNUSED, VALIDATION, VALIDATION, UNUSED,
    ]  # fmt: skip
    assert split_corpus(given, 0.5, 100).assigned[2] == TRAIN


def test_copies_alone_cannot_be_split():
    with pytest.raises(ConfigError, match="a single document, or copies of one"):
        split_corpus(_corpus(*_records("one", "one\n", "one ")), 0.5, 100, seen=Seen())


def test_a_source_of_which_nothing_is_left():
    seen = Seen()
    split_corpus(_corpus(*_records("one", "two")), 0.5, 100, seen=seen)
    with pytest.raises(ConfigError, match="nothing but documents that sources before it have"):
        split_corpus(_corpus(*_records("two", "one")), 0.5, 100, seen=seen)


def test_what_another_source_holds_out_is_no_training_text():
    texts = [f"text number {i}" for i in range(40)]
    one = splits.draft(_corpus(*_records(*texts)), 0.2, 10_000)
    other = splits.draft(_corpus(*_records(*texts[::-1], "more", "and more")), 0.3, 10_000)
    groups = [one.held_out_groups(), other.held_out_groups()]
    assert np.isin(other.groups[other.assigned == TRAIN], groups[0]).sum() == 0  # by hash, alike
    other.assigned[:] = TRAIN
    other.assigned[0] = VALIDATION
    groups[1] = other.held_out_groups()
    for draft in (one, other):
        splits.drop_held_out(draft, groups)
    held_out = {t for d in (one, other) for t in splits.finish(d).texts(VALIDATION)}
    for draft in (one, other):
        assert held_out.isdisjoint(splits.finish(draft).texts(TRAIN))
    assert other.provenance["copies_of_held_out_documents"] == len(groups[0])
    assert one.provenance == {"copies_of_held_out_documents": 1}
