"""Several sources as one text: ``data.mixture`` opened, under one tokenizer.

The sources are read in their order, so that a document that is in several stays with the first
(``data.deduplicate``), and what one source holds out is trained on in none. Each is then split,
tokenised and packed as it would be alone; only the order in which rows are drawn is of the mixture.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from moejax.config import ConfigError, check
from moejax.data import dataset as dataset_lib
from moejax.data import splits, store, tokenizers
from moejax.data.data_config import DataConfig, SourceConfig
from moejax.data.dataset import Part, TextDataset
from moejax.data.mixing import MixedRows, shares
from moejax.data.packing import Rows
from moejax.data.splits import SplitCorpus
from moejax.data.tokenizers import Tokenizer

_FIELDS = {field.name for field in dataclasses.fields(SourceConfig)}
# What provenance of shards says of the mixture that was tokenised together with them.
TOGETHER = "tokenised_with"


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of a mixture, opened: ``corpus`` where it is text, or else ``shards``."""

    number: int
    label: str
    config: DataConfig
    corpus: SplitCorpus | None = None
    shards: TextDataset | None = None

    def fingerprint(self, tokenizer: Tokenizer) -> str:
        """As of a dataset of this source alone."""
        if self.shards is not None:
            return self.shards.fingerprint
        return dataset_lib.dataset_fingerprint(self.corpus.fingerprint, tokenizer)

    def open(self, tokenizer: Tokenizer, seq_len: int) -> TextDataset:
        """The source as packed rows."""
        if self.shards is not None:
            return self.shards
        return dataset_lib.text_dataset(self.config, self.corpus, tokenizer, seq_len)


@contextlib.contextmanager
def of_source(number: int) -> Iterator[None]:
    """Names the source of the mixture in a ConfigError about one of its fields."""
    try:
        yield
    except ConfigError as error:
        block, _, name = error.field.partition(".")
        if block != "data" or name not in _FIELDS:
            raise
        field = f"data.mixture[{number}].{name}"
        raise ConfigError(field, error.value, error.remedy) from error


def open_sources(config: DataConfig, seq_len: int, max_bytes: int | None) -> list[Source]:
    """Opens every source of a mixture and decides what is held out of each.

    Args:
      config: the block ``data``, with a mixture.
      seq_len: S, for the rows of shards.
      max_bytes: refuse more text than this in all sources together; None takes any.

    Raises:
      ConfigError: a source that cannot be used, or too much text.
    """
    seen, total = dataset_lib.new_seen(config), 0
    drafts: dict[int, splits.Draft] = {}
    shards: dict[int, TextDataset] = {}
    for number in range(len(config.mixture)):
        own = config.source_config(number)
        with of_source(number):
            if own.source == "shards":
                from moejax.data import pretokenize  # only shards need ArrayRecord

                shards[number] = pretokenize.open_shards(own.path, seq_len)
            else:
                drafts[number] = dataset_lib.draft_of(own, max_bytes, seen)
                total += int(drafts[number].sizes.sum())
                splits.check_size(total, max_bytes)
    held_out = [draft.held_out_groups() for draft in drafts.values()]
    sources = []
    for number, block in enumerate(config.mixture):
        common = (number, block.called, config.source_config(number))
        if number in shards:
            sources.append(Source(*common, shards=shards[number]))
            continue
        with of_source(number):
            splits.drop_held_out(drafts[number], held_out)
            sources.append(Source(*common, corpus=splits.finish(drafts[number])))
    return sources


def choose_tokenizer(config: DataConfig, sources: Sequence[Source]) -> Tokenizer:
    """The one tokenizer of a mixture: that of its shards, where it has some, or the config's.

    A BPE is trained on text of every source by its share; where no weights are given, bytes stand
    in for the tokens that are not there yet.

    Raises:
      ConfigError: shards of several tokenizers, or a tokenizer.json that cannot be used.
    """
    shards = [source for source in sources if source.shards is not None]
    for source in shards:
        check(
            source.shards.tokenizer.fingerprint == shards[0].shards.tokenizer.fingerprint,
            f"data.mixture[{source.number}].path",
            source.config.path,
            f"has another tokenizer than {shards[0].config.path!r}; write both with one, "
            "`moejax tokenize` on a config with both in data.mixture, say",
        )
    if shards:
        return shards[0].shards.tokenizer
    if config.tokenizer != "bpe":
        return dataset_lib.given_tokenizer(config)
    parts = shares_of(config, [source.corpus.train_bytes for source in sources])
    sizes = [max(1, round(config.bpe_sample_bytes * part)) for part in parts]
    prints = [source.corpus.train_fingerprint for source in sources]
    recipe = ("mixture", config.bpe_vocab_size, *zip(prints, sizes, strict=True))
    return dataset_lib.trained_tokenizer(config, recipe, lambda: _sample(sources, sizes))


def _sample(sources: Sequence[Source], sizes: Sequence[int]) -> Iterable[str]:
    for source, size in zip(sources, sizes, strict=True):
        corpus = source.corpus
        texts = corpus.texts(splits.TRAIN)
        yield from tokenizers.spread_sample(texts, corpus.train_bytes, size)


def shares_of(config: DataConfig, sizes: Sequence[int]) -> list[float]:
    """Each source's share, of its weight, or else of its size; see ``mixing.shares``."""
    weights = [source.weight for source in config.mixture]
    return shares(sizes if weights[0] is None else weights, config.temperature)


def fingerprint(config: DataConfig, sources: Sequence[Source], tokenizer: Tokenizer) -> str:
    """SHA-256 over the sources in order, their weights and the temperature.

    Weights that are not given follow from the text and the tokenizer.
    """
    prints = [source.fingerprint(tokenizer) for source in sources]
    weights = [source.weight for source in config.mixture]
    recipe = ["mixture", prints, weights, config.temperature]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def open_mixture(
    config: DataConfig,
    seq_len: int,
    check_tokenizer: Callable[[Tokenizer], None] = lambda tokenizer: None,
) -> TextDataset:
    """Opens a config's mixture as one dataset with ``parts``.

    Args:
      config: the block ``data``, with a mixture.
      seq_len: S, positions of a row.
      check_tokenizer: may refuse the tokenizer before anything is tokenised.

    Raises:
      ConfigError: a source that cannot be used, too much text, tokenizers that differ, or a share
        that comes to nothing.
    """
    sources = open_sources(config, seq_len, config.max_bytes)
    tokenizer = choose_tokenizer(config, sources)
    check_tokenizer(tokenizer)
    datasets = [source.open(tokenizer, seq_len) for source in sources]
    for source, dataset in zip(sources, datasets, strict=True):
        label = f" of source {source.label!r}"
        dataset_lib.check_long_enough(dataset, seq_len, label)
    token_shares = shares_of(config, [dataset.train_tokens for dataset in datasets])
    try:
        train = MixedRows([dataset.train for dataset in datasets], token_shares)
    except ValueError as error:
        field = "data.mixture" if config.temperature >= 1 else "data.temperature"
        value = config.temperature if field == "data.temperature" else "..."
        remedy = f"leaves a source no row to be read ({error}); leave the source out"
        raise ConfigError(field, value, remedy) from error
    total = lambda name: sum(getattr(dataset, name) for dataset in datasets)
    parts = [
        Part(source.label, share, dataset)
        for source, share, dataset in zip(sources, token_shares, datasets, strict=True)
    ]
    return TextDataset(
        tokenizer=tokenizer,
        train=train,
        validation=Rows(store.joined([d.validation.store for d in datasets]), seq_len),
        train_bytes=total("train_bytes"),
        validation_bytes=total("validation_bytes"),
        fingerprint=fingerprint(config, sources, tokenizer),
        provenance=provenance(config, parts),
        train_counts=total("train_counts"),
        validation_counts=total("validation_counts"),
        gzip_bytes=total("gzip_bytes"),
        parts=tuple(parts),
    )


def provenance(config: DataConfig, parts: Sequence[Part]) -> dict[str, Any]:
    """What a mixture says of itself: each source's account, weight, share and fingerprint."""
    of_source = {
        part.label: {
            "share": part.share,
            "weight": block.weight or part.dataset.train_tokens,
            "train_tokens": part.dataset.train_tokens,
            "fingerprint": part.dataset.fingerprint,
            **part.dataset.provenance,
        }
        for block, part in zip(config.mixture, parts, strict=True)
    }
    licences = {str(own.get("licence", "unknown")) for own in of_source.values()}
    found = {
        "source": "mixture",
        "temperature": config.temperature,
        "licence": ", ".join(sorted(licences)),
        "sources": of_source,
    }
    warnings = [
        f"{label}: {own.pop('warning')}" for label, own in of_source.items() if "warning" in own
    ]
    shards = {label: own.get(TOGETHER) for label, own in of_source.items() if "shards" in own}
    together = len(set(shards.values())) == 1 and None not in shards.values()
    if shards and not (together and len(shards) == len(parts)) and len(parts) > 1:
        warnings.append(
            f"the shards of {', '.join(shards)} hold no text, so whether they repeat what another "
            "source holds out was not looked at; tokenise the whole mixture at once for that"
        )
    return {**found, "warning": "; ".join(warnings)} if warnings else found
