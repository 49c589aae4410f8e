"""Baselines against arithmetic by hand."""

import gzip
import math

import numpy as np
import pytest

from moejax.data import DataConfig, baselines, open_dataset
from moejax.data.baselines import bits_per_byte, gzip_bytes, unigram_nats


def test_unigram_by_hand():
    # Training counts 3, 1, 0 over V = 3, add one: 4/7, 2/7, 1/7. Held out: id 0 twice, id 2 once.
    # -(2 ln(4/7) + ln(1/7)) = 2 * 0.5596158 + 1.9459101 = 3.0651417 nats.
    nats = unigram_nats(np.array([3, 1, 0]), np.array([2, 0, 1]))
    assert nats == pytest.approx(3.0651417, abs=1e-6)
    # Over 4 bytes of text: 3.0651417 / 4 / ln 2 = 1.1055122 bits per byte.
    assert bits_per_byte(nats, 4) == pytest.approx(1.1055, abs=1e-4)


def test_gzip_is_one_stream_at_level_nine():
    text = b"the same words again and again, " * 50
    assert gzip_bytes(text) == len(gzip.compress(text, 9)) < 100


def test_of_a_dataset_from_its_own_rows(tmp_path):
    # A single file: the last tenth of the bytes is held out, cut at a line end.
    file = tmp_path / "a.txt"
    lines = [f"line {i:02d} of forty\n" for i in range(40)]
    file.write_text("".join(lines))
    config = DataConfig(source="text", path=str(file), validation_fraction=0.1)
    dataset = open_dataset(config, seq_len=32, vocab_size=257)
    train, held_out = "".join(lines[:36]).encode(), "".join(lines[36:]).encode()
    assert (dataset.train_bytes, dataset.validation_bytes) == (len(train), len(held_out))
    counts = np.bincount([*train, 256], minlength=257)
    total = len(train) + 1 + 257
    nats = -sum(math.log((counts[i] + 1) / total) for i in [*held_out, 256])
    found = baselines(dataset)
    assert found["unigram"] == pytest.approx(nats / len(held_out) / math.log(2), rel=1e-12)
    assert found["gzip"] == 8 * len(gzip.compress(held_out, 9)) / len(held_out)
