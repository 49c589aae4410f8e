"""Preferences as rows: one pair a row, its responses side by side, signs on their targets."""

import json

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data import DataConfig, open_dataset, train_iterator
from moejax.data.pair_files import parse_preference, read_preferences

SEPARATOR = 256
PAIRS = [(f"question {i}:", "good" * (1 + i % 3), "bad" * (1 + i % 2)) for i in range(40)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "preferences.jsonl"
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), p, strict=True))) for p in PAIRS]
    path.write_text("\n".join(lines) + "\n")
    return path


def opened(file, seq_len=80, **options):
    config = DataConfig(source="preferences", path=str(file), **options)
    return open_dataset(config, seq_len=seq_len, vocab_size=260)


def side(row, segment):
    """Prompt and response of a segment, and the weights of its targets."""
    here = row["segment_ids"] == segment
    tokens, targets, weights = (row[name][here] for name in ("tokens", "targets", "weights"))
    assert tokens[0] == targets[-1] == SEPARATOR
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    np.testing.assert_array_equal(row["positions"][here], np.arange(here.sum()))
    counted = weights != 0
    prompt = int(np.argmax(counted))
    assert counted[prompt:].all() and len(set(weights[prompt:].tolist())) == 1
    said = bytes(targets[:-1].tolist()).decode()
    return said[:prompt], said[prompt:], weights[-1]


def test_a_row_is_a_pair_and_every_pair_is_in_exactly_one(file):
    found, got = opened(file), []
    for rows in (found.train, found.validation):
        for row in (rows[i] for i in range(len(rows))):
            assert row["segment_ids"].max() == 2
            prompt, chosen, sign = side(row, 1)
            again, rejected, other = side(row, 2)
            assert prompt == again and (sign, other) == (1, -1)
            got.append((prompt, chosen, rejected))
            padding = row["segment_ids"] == 0
            assert not any(np.any(row[name][padding]) for name in row)
    assert sorted(got) == sorted(PAIRS)
    assert 0 < len(found.validation) < len(found.train) and len(got) == len(PAIRS)


def test_what_is_counted_is_of_the_responses_that_are_preferred(file):
    found = opened(file)
    rows = found.validation
    said = [side(rows[i], 1)[1] for i in range(len(rows))]
    assert found.validation_tokens == sum(len(text) + 1 for text in said)
    assert found.validation_bytes == sum(map(len, said))
    counts = np.bincount(
        np.frombuffer("".join(said).encode(), np.uint8), minlength=found.tokenizer.vocab_size
    )
    counts[SEPARATOR] = len(said)
    np.testing.assert_array_equal(found.validation_counts, counts)
    sides = [side(found.train[i], segment) for i in range(len(found.train)) for segment in (1, 2)]
    assert found.train.targets == sum(len(p) + len(said) + 1 for p, said, _ in sides)
    batch = next(train_iterator(found.train, batch_size=4, seed=0, prefetch=0))
    assert (batch["weights"].min(), batch["weights"].max()) == (-1, 1)


def test_the_fingerprint_is_of_both_responses(file, tmp_path):
    first = opened(file).fingerprint
    assert opened(file).fingerprint == first
    changed = tmp_path / "changed.jsonl"
    changed.write_text(file.read_text().replace('"rejected": "bad"', '"rejected": "bas"', 1))
    assert opened(changed).fingerprint != first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no field 'rejected'; write"),
        ({"prompt": "a", "chosen": "b", "rejected": 1}, "holds int in 'rejected', not text"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "has an empty completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "has the same response twice"),
        (["a", "b", "c"], "is not a JSON object"),
    ],
)
def test_a_bad_line_is_named(line, message):
    with pytest.raises(ConfigError, match=message):
        parse_preference(json.dumps(line).encode(), "file:1")


def test_longer_than_a_row(file):
    with pytest.raises(ConfigError, match=r"train.seq_len = 40: \d+ of 40 pairs are longer"):
        opened(file, seq_len=40)
    assert len(read_preferences(str(file))[0]) == len(PAIRS)
    found = opened(file, seq_len=42, drop_long=True)
    assert 0 < found.provenance["dropped_long_pairs"] < len(PAIRS)
