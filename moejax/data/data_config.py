"""The block ``data`` of the config: which text, which tokenizer, how much is held out."""

import dataclasses
import os
import pathlib
import re
from typing import Any, Literal

from moejax import config

PAIRED = ("pairs", "preferences")
SOURCES = ("stdlib", "text", "tfds", "shards", *PAIRED)
# Names that metrics have for something else: val/router/..., and the whole.
RESERVED_LABELS = ("router", "all")
LABEL = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of ``data.mixture``; the fields that ``DataConfig`` has too mean the same.

    ``DataConfig`` checks them, since it knows which one of the mixture this is.
    """

    source: Literal["stdlib", "text", "tfds", "shards"] = "stdlib"
    # Its part of the tokens trained on, in proportion to the other weights, before
    # ``data.temperature``. Without any weights, sources weigh as many tokens as they have.
    weight: float | None = None
    # What metrics and messages call it; "" takes the last part of its path, or its name.
    label: str = ""
    path: str = ""
    name: str = ""
    text_field: str = "text"
    download: bool = False
    validation_fraction: float | None = None  # None takes data.validation_fraction
    max_validation_bytes: int | None = None  # None takes data.max_validation_bytes

    @property
    def called(self) -> str:
        """The label, or one made of the path or the name, of letters that metrics can have."""
        if self.label:
            return self.label
        stem = pathlib.PurePath(self.path).name if self.source in ("text", "shards") else ""
        found = stem or (self.name if self.source == "tfds" else self.source)
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", found).lstrip(".-")

    @property
    def identity(self) -> tuple[str, ...]:
        """What makes two sources the same text."""
        path = os.path.abspath(os.path.expanduser(self.path)) if self.path else ""
        field = self.text_field if self.source in ("text", "tfds") else ""
        return (self.source, path, self.name if self.source == "tfds" else "", field)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens.

    Raises:
      ConfigError: a field that cannot be used; paths are looked at when the corpus is opened.
    """

    source: Literal["stdlib", "text", "tfds", "shards", "pairs", "preferences"] = "stdlib"
    # text: a UTF-8 file or a folder of them (.jsonl and .parquet too); shards: a folder written by
    # `moejax tokenize`; pairs: a JSONL file, or a folder of them, with the fields "prompt",
    # "completion" and maybe "weight"; preferences: the same with "prompt", "chosen" and "rejected",
    # for the block `preferences`; tfds: the data_dir, or "" for tfds' own default.
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
    # Several sources in place of source, path, name and text_field, which then stay unset.
    mixture: tuple[SourceConfig, ...] = ()
    # Shares of the sources are weight ** (1 / temperature), normalised: 1 keeps the weights, and
    # the larger it is, the more alike the shares. Arivazhagan et al. 2019 (arXiv 1907.05019)
    # sample languages so, with 5; mT5 (Xue et al. 2021, arXiv 2010.11934) with 1 / 0.3.
    temperature: float = 1.0
    # "exact": of documents whose text is equal, white space at its end aside, the first one stays;
    # of a mixture's, the one in the first source that has it.
    deduplicate: Literal["none", "exact"] = "none"
    # Pairs longer than a row are left out; otherwise they are refused. None is ever cut.
    drop_long: bool = False

    def __post_init__(self):
        _check_source("data", self)
        self._check_pairs()
        self._check_mixture()
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
        config.check_positive("data", self, "bpe_sample_bytes", "max_bytes")
        config.check_not_negative("data", self, "prefetch")

    def _check_pairs(self) -> None:
        pairs = self.source in PAIRED
        config.check(
            pairs or not self.drop_long,
            "data.drop_long",
            self.drop_long,
            "is of data.source 'pairs' and 'preferences'; documents of text are cut to rows, so "
            "leave it False",
        )
        config.check(
            self.deduplicate == "none" or not pairs,
            "data.deduplicate",
            self.deduplicate,
            f"is of documents, and data.source {self.source!r} takes every pair; leave it 'none'",
        )
        for i, source in enumerate(self.mixture):
            config.check(
                source.source not in PAIRED,
                f"data.mixture[{i}].source",
                source.source,
                f"cannot be mixed; put all pairs into one folder, and set data.source = "
                f"{source.source!r}",
            )

    def _check_mixture(self) -> None:
        config.check_positive("data", self, "temperature")
        shards = self.source == "shards" or any(s.source == "shards" for s in self.mixture)
        config.check(
            self.deduplicate == "none" or not shards,
            "data.deduplicate",
            self.deduplicate,
            "needs text, and shards hold tokens; set it where `moejax tokenize` writes them",
        )
        if not self.mixture:
            config.check(
                self.temperature == 1.0,
                "data.temperature",
                self.temperature,
                "is of data.mixture, which names no sources; name some, or leave it at 1",
            )
            return
        for name in ("source", "path", "name", "text_field", "download"):
            value, unset = getattr(self, name), getattr(SourceConfig(), name)
            remedy = "is set beside data.mixture; put it into the mixture, or leave one of them out"
            config.check(value == unset, f"data.{name}", value, remedy)
        given = [source.weight is not None for source in self.mixture]
        for i, source in enumerate(self.mixture):
            where = f"data.mixture[{i}]"
            _check_source(where, source)
            config.check(
                source.weight is None or source.weight > 0,
                f"{where}.weight",
                source.weight,
                "must be above zero; leave the source out if it shall not be read",
            )
            config.check(
                given[i] == given[0],
                f"{where}.weight",
                source.weight,
                "give every source of data.mixture a weight, or none of them",
            )
            self._check_distinct(i)

    def _check_distinct(self, i: int) -> None:
        """A source is neither one before it in the mixture nor called like one."""
        source, where = self.mixture[i], f"data.mixture[{i}]"
        for j, other in enumerate(self.mixture[:i]):
            config.check(
                source.identity != other.identity,
                where,
                source.path or source.name or source.source,
                f"is the same source as data.mixture[{j}]; name it once, with a larger weight",
            )
            config.check(
                source.called != other.called,
                f"{where}.label",
                source.called,
                f"is what data.mixture[{j}] is called; give one of them another label",
            )
        config.check(
            re.fullmatch(LABEL, source.called) is not None and source.called not in RESERVED_LABELS,
            f"{where}.label",
            source.called,
            "cannot name metrics and folders; give a label of at most 64 letters, digits, '_', '-' "
            "and '.', that begins with none of the last two and is not "
            + " or ".join(map(repr, RESERVED_LABELS)),
        )

    def source_config(self, i: int) -> "DataConfig":
        """The block ``data`` as it would be with the mixture's source ``i`` alone."""
        source = self.mixture[i]
        own = {name: value for name in _SHARED if (value := getattr(source, name)) is not None}
        return dataclasses.replace(self, mixture=(), temperature=1.0, **own)

    @property
    def weighted(self) -> bool:
        """Whether targets have weights in the loss: those of pairs and preferences have."""
        return self.source in PAIRED

    @property
    def shown(self) -> str:
        """What the text is, for messages: the path, the source, or the mixture's labels."""
        if self.mixture:
            return f"mixture of {', '.join(source.called for source in self.mixture)}"
        return self.path or self.source

    @property
    def cache_path(self) -> pathlib.Path:
        """The cache folder: ``cache_dir``, or else ``$MOEJAX_CACHE``, or else ~/.cache/moejax."""
        chosen = self.cache_dir or os.environ.get("MOEJAX_CACHE") or "~/.cache/moejax"
        return pathlib.Path(chosen).expanduser()


_SHARED = tuple(
    f.name for f in dataclasses.fields(SourceConfig) if f.name not in ("weight", "label")
)


def _check_source(prefix: str, options: Any) -> None:
    """Checks the fields that a source of a mixture shares with the whole block."""
    config.check(
        options.source in SOURCES,
        f"{prefix}.source",
        options.source,
        f"not a source; {config.nearest(str(options.source), SOURCES)}",
    )
    needs_path = options.source in ("text", "shards", *PAIRED)
    config.check(
        bool(options.path) or not needs_path,
        f"{prefix}.path",
        options.path,
        f"is empty; data.source {options.source!r} needs a file or folder",
    )
    config.check(
        bool(options.name) or options.source != "tfds",
        f"{prefix}.name",
        options.name,
        "is empty; name a tfds dataset, for example 'tiny_shakespeare'",
    )
    config.check(
        bool(options.text_field),
        f"{prefix}.text_field",
        options.text_field,
        "is empty; name a field",
    )
    fraction, most = options.validation_fraction, options.max_validation_bytes
    config.check(
        fraction is None or 0.0 < fraction < 1.0,
        f"{prefix}.validation_fraction",
        fraction,
        "must lie between 0 and 1, both excluded",
    )
    config.check(
        most is None or most > 0, f"{prefix}.max_validation_bytes", most, "must be above zero"
    )
