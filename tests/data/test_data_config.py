"""The block ``data``: each bad field is one line that names it."""

import pathlib

import pytest

from moejax import config
from moejax.config import ConfigError
from moejax.data import DataConfig, SourceConfig


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
        ("temperature", 0.0, {}, "must be above zero"),
        ("temperature", 2.0, {}, "is of data.mixture, which names no sources"),
        ("deduplicate", "exact", {"source": "shards", "path": "x"}, "shards hold tokens"),
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


TEXT, STDLIB = SourceConfig("text", path="/a/notes"), SourceConfig()


@pytest.mark.parametrize(
    ("mixture", "field", "message"),
    [
        ([SourceConfig("stdlb")], "[0].source = 'stdlb'", "did you mean 'stdlib'?"),
        ([TEXT, SourceConfig("text")], "[1].path = ''", "needs a file or folder"),
        ([TEXT, SourceConfig("tfds")], "[1].name = ''", "name a tfds dataset"),
        ([SourceConfig(weight=0.0)], "[0].weight = 0.0", "must be above zero; leave the source"),
        ([SourceConfig(weight=-1.0)], "[0].weight = -1.0", "must be above zero"),
        ([SourceConfig(weight=1.0), TEXT], "[1].weight = None", "every source of data.mixture a"),
        ([TEXT, TEXT], "[1] = '/a/notes'", "is the same source as data.mixture[0]"),
        (
            [TEXT, SourceConfig("text", path="/a/b/../notes/")],
            "[1] = '/a/b/../notes/'",
            "is the same",
        ),
        ([STDLIB, SourceConfig(weight=None)], "[1] = 'stdlib'", "is the same source"),
        ([TEXT, SourceConfig("text", path="/b/notes")], "[1].label = 'notes'", "another label"),
        ([SourceConfig(label="../up")], "[0].label = '../up'", "cannot name metrics and folders"),
        ([SourceConfig(label="..")], "[0].label = '..'", "cannot name metrics and folders"),
        ([SourceConfig("text", path="/x/router")], "[0].label = 'router'", "is not 'router'"),
        ([SourceConfig(validation_fraction=1.5)], "[0].validation_fraction = 1.5", "between 0"),
        ([SourceConfig(max_validation_bytes=0)], "[0].max_validation_bytes = 0", "above zero"),
        ([SourceConfig("shards", path="x")], "data.deduplicate = 'exact'", "shards hold tokens"),
    ],
)
def test_a_bad_mixture(mixture, field, message):
    with pytest.raises(ConfigError) as error:
        DataConfig(mixture=tuple(mixture), deduplicate="exact")
    shown = field if field.startswith("data.") else f"data.mixture{field}"
    assert str(error.value).startswith(f"{shown}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("source", "text"), ("path", "/x"), ("name", "x"), ("text_field", "body"), ("download", True)],
)
def test_a_source_beside_a_mixture(field, value):
    more = {"path": "/x"} if field == "source" else {}
    with pytest.raises(ConfigError, match=rf"data\.{field} = .*is set beside data\.mixture"):
        DataConfig(mixture=(STDLIB,), **{field: value}, **more)


def test_labels_come_of_paths_and_names():
    called = lambda *fields, **more: SourceConfig(*fields, **more).called
    assert called() == "stdlib"
    assert called("text", path="/data/my notes/") == "my_notes"
    assert called("text", path="~/.hidden.txt") == "hidden.txt"
    assert called("tfds", name="wiki40b/en") == "wiki40b_en"
    assert called("shards", path="out/web", label="w") == "w"


def test_a_mixture_is_built_from_mappings_and_shown_by_its_labels():
    blocks = [{"source": "text", "path": "/a/notes", "weight": 2}, {"weight": 1}]
    found = config.build(DataConfig, {"mixture": blocks, "tokenizer": "bpe"}, "data")
    assert found.mixture == (SourceConfig("text", 2.0, path="/a/notes"), SourceConfig(weight=1.0))
    assert found.shown == "mixture of notes, stdlib"
    own = found.source_config(0)
    assert (own.source, own.path, own.tokenizer, own.mixture) == ("text", "/a/notes", "bpe", ())
    assert config.build(DataConfig, config.to_dict(found), "data") == found
    for bad, message in (
        ({"weigth": 1}, r"data\.mixture\[0\]\.weigth = 1: no such field; did you mean 'weight'"),
        ({"weight": "x"}, r"data\.mixture\[0\]\.weight = 'x': is a string, but must be a number"),
        ({"source": "webb"}, r"data\.mixture\[0\]\.source = 'webb': not a possible value"),
        ("stdlib", r"data\.mixture\[0\] = 'stdlib': must be a block of fields"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.build(DataConfig, {"mixture": [bad]}, "data")
