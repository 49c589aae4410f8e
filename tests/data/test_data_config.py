"""The block ``data``: each bad field is one line that names it."""

import pathlib

import pytest

from moejax import config
from moejax.config import ConfigError
from moejax.data import DataConfig


@pytest.mark.parametrize(
    ("field", "value", "more", "message"),
    [
        ("source", "stdlb", {}, "did you mean 'stdlib'?"),
        ("path", "", {"source": "text"}, "data.source 'text' needs a file or folder"),
        ("path", "", {"source": "shards"}, "data.source 'shards' needs a file or folder"),
        ("name", "", {"source": "tfds"}, "name a tfds dataset"),
        ("text_field", "", {}, "name a field"),
        ("tokenizer", "", {}, "use 'bytes', 'bpe' or the path"),
        ("bpe_vocab_size", 256, {}, "must be between 257"),
        ("validation_fraction", 0.0, {}, "between 0 and 1"),
        ("validation_fraction", 1.0, {}, "between 0 and 1"),
        ("max_validation_bytes", 0, {}, "must be above zero"),
        ("max_bytes", -1, {}, "must be above zero"),
        ("bpe_sample_bytes", 0, {}, "must be above zero"),
        ("prefetch", -1, {}, "must not be below zero"),
    ],
)
def test_a_bad_field(field, value, more, message):
    with pytest.raises(ConfigError) as error:
        DataConfig(**{field: value}, **more)
    assert str(error.value).startswith(f"data.{field} = {value!r}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_it_is_built_from_a_mapping_and_refuses_unknown_fields():
    assert config.build(DataConfig, {"tokenizer": "bpe"}, "data").tokenizer == "bpe"
    with pytest.raises(ConfigError, match=r"data\.tokeniser = 'bpe': .*did you mean 'tokenizer'"):
        config.build(DataConfig, {"tokeniser": "bpe"}, "data")


def test_the_cache_folder_is_the_field_or_the_variable_or_the_home(monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", "/elsewhere")
    assert DataConfig(cache_dir="/here").cache_path == pathlib.Path("/here")
    assert DataConfig().cache_path == pathlib.Path("/elsewhere")
    monkeypatch.delenv("MOEJAX_CACHE")
    assert DataConfig().cache_path == pathlib.Path.home() / ".cache" / "moejax"
