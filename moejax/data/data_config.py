"""The block ``data`` of the config: which text, which tokenizer, how much is held out."""

import dataclasses
import os
import pathlib
from typing import Literal

from moejax import config

SOURCES = ("stdlib", "text", "tfds", "shards")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens.

    Raises:
      ConfigError: a field that cannot be used; paths are looked at when the corpus is opened.
    """

    source: Literal["stdlib", "text", "tfds", "shards"] = "stdlib"
    # text: a UTF-8 file or a folder of them (.jsonl and .parquet too); shards: a folder written by
    # `moejax tokenize`; tfds: the data_dir, or "" for tfds' own default.
    path: str = ""
    name: str = ""  # tfds dataset, for example "tiny_shakespeare" or "wiki40b/en"
    text_field: str = "text"  # the field of JSONL, parquet and tfds records that holds the text
    download: bool = False  # let tfds download and prepare a dataset that is not on disk
    # "bytes", "bpe" (trained on the training split), or the path of a tokenizer.json. Shards bring
    # their own tokenizer.
    tokenizer: str = "bytes"
    separator: str = ""  # end-of-text token of a given tokenizer.json; "" looks for a usual one
    bpe_vocab_size: int = 4096  # ids of a trained BPE, the separator included
    # Train the BPE on about so much evenly spread text. On the built-in corpus, 4 MB of its 12
    # compress 0.4 % worse than all of it and take a third of the time.
    bpe_sample_bytes: int = 4_000_000
    validation_fraction: float = 0.05  # of the bytes, where the corpus has no split of its own
    max_validation_bytes: int = 600_000  # hold out no more than this
    max_bytes: int = 2_000_000_000  # more text than this is not tokenised in memory
    # "" is $MOEJAX_CACHE, or else ~/.cache/moejax. Trained tokenizers and tokens are kept there.
    cache_dir: str = ""
    prefetch: int = 2  # batches made ahead of the train step; 0 makes each when it is asked for

    def __post_init__(self):
        config.check(
            self.source in SOURCES,
            "data.source",
            self.source,
            f"not a source; {config.nearest(str(self.source), SOURCES)}",
        )
        needs_path = self.source in ("text", "shards")
        config.check(
            bool(self.path) or not needs_path,
            "data.path",
            self.path,
            f"is empty; data.source {self.source!r} needs a file or folder",
        )
        config.check(
            bool(self.name) or self.source != "tfds",
            "data.name",
            self.name,
            "is empty; name a tfds dataset, for example 'tiny_shakespeare'",
        )
        config.check(
            bool(self.text_field), "data.text_field", self.text_field, "is empty; name a field"
        )
        config.check(
            bool(self.tokenizer),
            "data.tokenizer",
            self.tokenizer,
            "is empty; use 'bytes', 'bpe' or the path of a tokenizer.json",
        )
        config.check(
            257 <= self.bpe_vocab_size <= 2**20,
            "data.bpe_vocab_size",
            self.bpe_vocab_size,
            "must be between 257 (256 bytes and the separator) and 1048576",
        )
        config.check(
            0.0 < self.validation_fraction < 1.0,
            "data.validation_fraction",
            self.validation_fraction,
            "must lie between 0 and 1, both excluded",
        )
        config.check_positive("data", self, "bpe_sample_bytes", "max_validation_bytes", "max_bytes")
        config.check_not_negative("data", self, "prefetch")

    @property
    def cache_path(self) -> pathlib.Path:
        """The cache folder: ``cache_dir``, or else ``$MOEJAX_CACHE``, or else ~/.cache/moejax."""
        chosen = self.cache_dir or os.environ.get("MOEJAX_CACHE") or "~/.cache/moejax"
        return pathlib.Path(chosen).expanduser()
