"""Text corpora of tensorflow-datasets, by name, read from ArrayRecord files without TensorFlow."""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
import tensorflow_datasets.text

from moejax import config as config_lib
from moejax.data.data_config import DataConfig
from moejax.data.documents import Corpus, Document, field_of

READ_AT_ONCE = 256


def tfds_corpus(config: DataConfig) -> Corpus:
    """A named dataset; each record is one document.

    The splits ``train`` and ``validation`` (or else ``test``) are used where they exist, and
    otherwise part of ``train`` is held out by the hash of its text.

    Raises:
      ConfigError: an unknown name, a dataset that is not on disk where ``data.download`` is off,
        or one that cannot be read at random.
    """
    builder = _builder(config)
    if not builder.is_prepared():
        _prepare(config, builder)
    held_out = [split for split in ("validation", "test") if split in builder.info.splits][:1]
    sources = {"train": _source(config, builder, "train")}
    for split in held_out:
        sources["validation"] = _source(config, builder, split)
    _check_field(config, builder)

    def read() -> Iterator[Document]:
        for split, source in sources.items():
            for number, record in enumerate(_records(source)):
                name = f"{config.name}/{split}:{number}"
                given = split if held_out else None
                yield Document(field_of(record, config.text_field, name), name, split=given)

    provenance = {
        "source": "tfds",
        "name": builder.info.full_name,
        "splits": {"train": "train", "validation": held_out[0] if held_out else "by hash of train"},
        "licence": builder.info.redistribution_info.license or "unknown",
        "homepage": builder.info.homepage,
    }
    return Corpus(read, provenance)


def read_split(config: DataConfig, split: str) -> Iterator[dict[str, Any]]:
    """Every record of one split of a named dataset, in order.

    Raises:
      ConfigError: as ``tfds_corpus``; the text field is not looked at.
    """
    builder = _builder(config)
    if not builder.is_prepared():
        _prepare(config, builder)
    yield from _records(_source(config, builder, split))


def _builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    # A namespace is asked for over the network, and has loaders of its own.
    config_lib.check(
        re.match(r"\w+:[A-Za-z_]", config.name) is None, "data.name", config.name,
        "is of a community's namespace, which moejax does not load; prepare it as files, and name "
        "their folder",
    )  # fmt: skip
    data_dir = str(pathlib.Path(config.path).expanduser()) if config.path else None
    try:
        return tfds.builder(config.name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.core.registered.list_imported_builders()
        hint = config_lib.nearest(config.name.partition("/")[0], known)
        if not hint.startswith("did you mean"):
            hint = "see tensorflow.org/datasets for names"
        where = f", nor in {data_dir}" if data_dir else ""
        remedy = f"no such dataset in tensorflow-datasets{where}; {hint}"
        raise config_lib.ConfigError("data.name", config.name, remedy) from error
    except Exception as error:  # tfds raises plain ValueError on an unknown config or version
        remedy = f"tensorflow-datasets cannot open it ({_first_line(error)}); mend the name"
        raise config_lib.ConfigError("data.name", config.name, remedy) from error


def _prepare(config: DataConfig, builder: tfds.core.DatasetBuilder) -> None:
    """Downloads a dataset if the config allows it. Without a network tfds retries for minutes."""
    config_lib.check(
        config.download,
        "data.name",
        config.name,
        f"is not prepared in {builder.data_path}; set data.download=True where there is a network, "
        "or data.path to the tfds folder that has it",
    )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        remedy = f"could not be prepared ({_first_line(error)}); check the network and the disk"
        raise config_lib.ConfigError("data.name", config.name, remedy) from error


def _source(
    config: DataConfig, builder: tfds.core.DatasetBuilder, split: str
) -> Sequence[dict[str, Any]]:
    try:
        return builder.as_data_source(split=split)
    except Exception as error:  # NotImplementedError for TFRecord files, ValueError for no split
        remedy = (
            f"its split {split!r} cannot be read at random ({_first_line(error)}); "
            "prepare it again with file_format='array_record'"
        )
        raise config_lib.ConfigError("data.name", config.name, remedy) from error


def _records(source: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(source), READ_AT_ONCE):
        yield from source.__getitems__(range(start, min(start + READ_AT_ONCE, len(source))))


def _check_field(config: DataConfig, builder: tfds.core.DatasetBuilder) -> None:
    features = list(builder.info.features or ())
    config_lib.check(
        config.text_field in features,
        "data.text_field",
        config.text_field,
        f"no such field in {config.name}; {config_lib.nearest(config.text_field, features)}",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
