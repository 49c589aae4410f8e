"""Local text as a tensorflow-datasets dataset in ArrayRecord format, built without TensorFlow.

What ``build`` writes is read by ``data.source='tfds'`` with ``data.name`` and ``data.path`` set to
the name and the folder, by ``tfds.data_source``, and by every other reader of tfds datasets.
"""

import pathlib
import re
from collections.abc import Iterator

import tensorflow_datasets as tfds

from moejax import config as config_lib
from moejax.data import splits
from moejax.data.data_config import DataConfig
from moejax.data.dataset import split_of


def _builder_class(name: str, corpus: splits.SplitCorpus) -> type[tfds.core.DatasetBuilder]:
    class LocalText(tfds.core.GeneratorBasedBuilder):
        """The documents of a corpus, in its order and with its split."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Local text, fingerprint {corpus.fingerprint}",
                features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager) -> dict:
            del dl_manager  # nothing is downloaded
            return {
                "train": self._generate_examples(splits.TRAIN),
                "validation": self._generate_examples(splits.VALIDATION),
            }

        def _generate_examples(self, split: int) -> Iterator[tuple[int, dict[str, str]]]:
            for number, text in enumerate(corpus.texts(split)):
                yield number, {"text": text}

    LocalText.name = name
    return LocalText


def build(config: DataConfig, name: str, data_dir: str | pathlib.Path) -> pathlib.Path:
    """Writes the text of a config's source as a tfds dataset with ``train`` and ``validation``.

    Args:
      config: any source that holds text, ``text`` or ``stdlib`` for example.
      name: of the new dataset, in snake case.
      data_dir: the tfds folder; the dataset goes to ``data_dir/name/1.0.0``.

    Returns:
      The dataset's folder. Read as source ``tfds`` it has the rows and the fingerprint of the
      source it was made from.

    Raises:
      ConfigError: a name that is not in snake case, or a source that cannot be used.
    """
    config_lib.check(
        re.fullmatch("[a-z][a-z0-9_]*", name) is not None,
        "name",
        name,
        "must be lower-case letters, digits and underscores",
    )
    config_lib.check(
        config.source != "shards", "data.source", "shards", "holds tokens; name a source of text"
    )
    corpus = split_of(config, None)
    # Not registered: a registered class would hide the dataset's files from tfds.builder(name).
    with tfds.core.registered.skip_registration():
        cls = _builder_class(name, corpus)
    builder = cls(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return pathlib.Path(builder.data_path)
