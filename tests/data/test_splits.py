"""What is held out: by hash, within the budget, and never seen in training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError, UserError
from moejax.data import splits
from moejax.data.documents import Corpus, Document
from moejax.data.splits import TRAIN, UNUSED, VALIDATION, held_out, split_corpus


def _corpus(*documents):
    return Corpus(lambda: iter(documents), {"source": "test", "path": "here"})


def _records(*texts, split=None):
    return [Document(text, f"record {i}", split=split) for i, text in enumerate(texts)]


def _texts(split, code):
    return list(split.texts(code))


def test_held_out_by_hand():
    # In the order of keys: sizes 50 (too much for 40), 30 (taken), 20 (no longer fits), 8 (fits;
    # 38 of 40 is above nine tenths, so it ends there), 2 (not looked at).
    keys = np.array([5, 4, 3, 2, 1], np.uint64)
    sizes = np.array([2, 8, 20, 30, 50])
    chosen = held_out(keys, np.arange(5, dtype=np.uint64), sizes, 40)
    assert chosen.tolist() == [False, True, False, True, False]


def test_where_none_fits_the_smallest_is_held_out():
    keys = np.array([1, 2], np.uint64)
    assert held_out(keys, keys, np.array([100, 60]), 10).tolist() == [False, True]


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(st.text("ab", max_size=6), min_size=2, max_size=30),
    fraction=st.floats(0.05, 0.6),
)
def test_no_text_is_both_trained_on_and_held_out(texts, fraction):
    distinct = {text for text in texts if text}
    corpus = _corpus(*_records(*texts))
    if len(distinct) < 2:
        with pytest.raises(ConfigError):
            split_corpus(corpus, fraction, 1000)
        return
    split = split_corpus(corpus, fraction, 1000)
    train, validation = _texts(split, TRAIN), _texts(split, VALIDATION)
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(text for text in texts if text)
    assert split.train_bytes == sum(map(len, train))
    assert split.validation_bytes == sum(map(len, validation))


def test_copies_of_a_file_go_together():
    same = [Document("the same text", f"{i}.txt", key=f"{i}.txt") for i in range(20)]
    other = [Document(f"another text {i}", f"o{i}", key=f"o{i}") for i in range(200)]
    split = split_corpus(_corpus(*same, *other), 0.2, 10_000)
    assert len(set(split.assigned[:20].tolist())) == 1
    assert 0.1 < split.validation_bytes / (split.train_bytes + split.validation_bytes) <= 0.2


def test_the_choice_does_not_depend_on_the_order():
    documents = _records(*(f"text number {i}" for i in range(100)))
    forth = split_corpus(_corpus(*documents), 0.2, 10_000)
    back = split_corpus(_corpus(*reversed(documents)), 0.2, 10_000)
    assert set(_texts(forth, VALIDATION)) == set(_texts(back, VALIDATION))
    assert forth.fingerprint != back.fingerprint  # rows would differ


def test_given_splits_stay_and_their_copies_leave_training():
    train = _records("a", "b", "held", split="train")
    split = split_corpus(_corpus(*train, *_records("held", "c", split="validation")), 0.5, 100)
    assert split.assigned.tolist() == [TRAIN, TRAIN, UNUSED, VALIDATION, VALIDATION]
    assert split.provenance["unused_documents"] == 1


def test_a_given_validation_split_is_cut_to_its_maximum():
    validation = _records(*(f"{i:04d}" for i in range(100)), split="validation")
    split = split_corpus(_corpus(*_records("x", split="train"), *validation), 0.5, 40)
    assert 36 <= split.validation_bytes <= 40


def test_the_fingerprint_knows_the_text_and_the_split():
    documents = _records(*(f"text number {i}" for i in range(50)))
    split = split_corpus(_corpus(*documents), 0.2, 10_000)
    assert split.fingerprint == split_corpus(_corpus(*documents), 0.2, 10_000).fingerprint
    wider = split_corpus(_corpus(*documents), 0.4, 10_000)
    edited = split_corpus(_corpus(*documents[:-1], *_records("text")), 0.2, 10_000)
    assert len({split.fingerprint, wider.fingerprint, edited.fingerprint}) == 3


def test_too_much_text_for_memory():
    with pytest.raises(ConfigError, match=r"data\.max_bytes = 5: .*run `moejax tokenize`"):
        split_corpus(_corpus(*_records("abc", "def")), 0.5, 100, max_bytes=5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "holds no text at all"),
        (["", ""], "holds no text at all"),
        (["one"], "a single document"),
        (["one", "one"], "copies of one"),
    ],
)
def test_a_corpus_that_cannot_be_split(texts, message):
    with pytest.raises(ConfigError, match=message) as error:
        split_corpus(_corpus(*_records(*texts)), 0.5, 100)
    assert error.value.field == "data.path"


def test_a_corpus_that_shrinks_while_it_is_read():
    documents = _records("a", "b", "c")
    split = split_corpus(Corpus(lambda: iter(documents), {"path": "here"}), 0.4, 100)
    del documents[1:]
    with pytest.raises(UserError, match="changed while it was read"):
        list(split.texts(splits.TRAIN))
