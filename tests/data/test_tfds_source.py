"""tensorflow-datasets without TensorFlow and without a network: mocked, built, and refused."""

import dataclasses
import sys
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moejax.config import ConfigError
from moejax.data import DataConfig, open_dataset, tfds_builder


@pytest.fixture
def mocked():
    """tfds with made-up records; its own mock of reading several at once lacks an argument."""
    patched = mock.patch(
        "tensorflow_datasets.testing.mocking._getitems",
        lambda keys, generator: [generator[key] for key in keys],
    )
    policy = tfds.testing.MockPolicy.USE_CODE
    with patched, tfds.testing.mock_data(num_examples=40, policy=policy):
        yield


@pytest.mark.parametrize(
    ("name", "field"),
    [("tiny_shakespeare", "text"), ("wiki40b/en", "text"), ("gsm8k", "question"), ("lm1b", "text")],
)
def test_a_named_corpus(mocked, name, field):
    config = DataConfig(source="tfds", name=name, text_field=field, download=True)
    dataset = open_dataset(config, seq_len=16, vocab_size=257)
    assert dataset.provenance["name"].startswith(name)
    assert dataset.provenance["documents"] == 40
    assert len(dataset.train) > len(dataset.validation) > 0
    assert "tensorflow" not in sys.modules


def test_our_own_builder_gives_the_rows_of_the_text_it_was_made_from(config, tmp_path):
    path = tfds_builder.build(config, "my_text", tmp_path)
    assert path == tmp_path / "my_text" / "1.0.0"
    assert list(path.glob("*.array_record*"))
    source = tfds.data_source("my_text", split="validation", data_dir=str(tmp_path))
    assert isinstance(source[0]["text"], bytes)
    read = DataConfig(source="tfds", name="my_text", path=str(tmp_path))
    direct = open_dataset(config, seq_len=32, vocab_size=257)
    built = open_dataset(read, seq_len=32, vocab_size=257)
    assert built.fingerprint == direct.fingerprint
    assert built.provenance["splits"]["validation"] == "validation"
    for split in ("train", "validation"):
        left, right = getattr(direct, split), getattr(built, split)
        assert len(left) == len(right)
        for i in range(len(left)):
            np.testing.assert_array_equal(left[i]["tokens"], right[i]["tokens"])
    wrong = dataclasses.replace(read, text_field="txt")
    with pytest.raises(ConfigError, match=r"data\.text_field = 'txt': .*did you mean 'text'"):
        open_dataset(wrong, seq_len=32, vocab_size=257)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_shakespear", "did you mean 'tiny_shakespeare'?"),
        ("qqqqqqqqqq", "see tensorflow.org/datasets for names"),
        ("wiki40b/xx", "cannot open it"),
        ("a name!", "cannot open it"),
        ("tiny_shakespeare", "is not prepared in"),
    ],
)
def test_a_dataset_that_is_not_there(tmp_path, name, message):
    config = DataConfig(source="tfds", name=name, path=str(tmp_path))
    with pytest.raises(ConfigError) as error:
        open_dataset(config, seq_len=32, vocab_size=257)
    assert str(error.value).startswith(f"data.name = {name!r}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_one_line(tmp_path):
    config = DataConfig(source="tfds", name="tiny_shakespeare", path=str(tmp_path), download=True)
    failing = mock.patch.object(
        tfds.core.DatasetBuilder, "download_and_prepare", side_effect=OSError("no network\nat all")
    )
    with (
        failing,
        pytest.raises(ConfigError, match=r"could not be prepared \(OSError: no network\)"),
    ):
        open_dataset(config, seq_len=32, vocab_size=257)


@pytest.mark.parametrize("name", ["My Text", "", "9lives", "a/b"])
def test_a_builder_needs_a_snake_case_name(config, tmp_path, name):
    with pytest.raises(ConfigError, match="lower-case letters"):
        tfds_builder.build(config, name, tmp_path)


def test_a_builder_needs_text(tmp_path):
    config = DataConfig(source="shards", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.source = 'shards': holds tokens"):
        tfds_builder.build(config, "again", tmp_path)
