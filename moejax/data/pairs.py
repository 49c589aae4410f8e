"""Prompts and completions as packed rows with weights: the loss counts completions only.

A pair is the sequence ``sep prompt completion sep``, the last separator being the stop token. Its
(input, target) pairs are those of a document (``moejax.data.packing``), and its targets weigh 0
over the prompt and 1, or the pair's own weight, from the completion's first token to the stop
token. A pair is never cut: rows hold whole ones, packed best fit in decreasing length. Prompt and
completion are tokenised apart, as a sampler meets them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt64

from moejax import config as config_lib
from moejax.data import splits, tokenizers
from moejax.data.baselines import gzip_bytes
from moejax.data.data_config import DataConfig
from moejax.data.dataset import (
    TextDataset,
    dataset_fingerprint,
    given_tokenizer,
    trained_tokenizer,
)
from moejax.data.packing import Plan, Row, Rows, plan_of
from moejax.data.pair_files import Pairs, read_pairs
from moejax.data.store import MemoryStore, token_dtype
from moejax.data.tokenizers import Tokenizer


class PairRows(Rows):
    """Rows of whole pairs; ``weights`` (S,) float32 stands beside what rows of text have.

    Attributes:
      counted: targets that weigh more than 0, by which held-out text is judged: those of
        completions, stop tokens included.
    """

    weighted = True

    def __init__(
        self,
        store: MemoryStore,
        seq_len: int,
        prompt_lengths: Int64[np.ndarray, " pairs"],
        weights: Float32[np.ndarray, " pairs"],
    ):
        """Plans the rows.

        Args:
          store: each pair's ids as one document, at most ``seq_len`` - 1 of them.
          seq_len: S.
          prompt_lengths: how many of each pair's ids are the prompt's.
          weights: of its other targets.
        """
        self._starts = np.cumsum(store.lengths) - store.lengths
        self._prompt_lengths, self._weights = prompt_lengths, weights
        super().__init__(store, seq_len)
        self.counted = int(((store.lengths - prompt_lengths) * (weights > 0)).sum())

    def _make_plan(self) -> Plan:
        return plan_of(self._starts, self.store.lengths.astype(np.int32), self.seq_len)

    def pairs_of(self, index: int) -> Int64[np.ndarray, " n"]:
        """Numbers of the pairs in a row, in their order there."""
        first, last = self.plan.row_starts[index], self.plan.row_starts[index + 1]
        return np.searchsorted(self._starts, self.plan.starts[first:last])

    def __getitem__(self, index: int) -> Row:
        """Row ``index``: as of text, and ``weights`` (S,) float32; zeros over prompts and padding.

        Raises:
          IndexError: no such row.
        """
        row = super().__getitem__(index)
        row["weights"], at = np.zeros(self.seq_len, np.float32), 0
        for pair in self.pairs_of(index):
            size = int(self.store.lengths[pair])
            row["weights"][at + self._prompt_lengths[pair] : at + size] = self._weights[pair]
            at += size
        return row

    def target_counts(self, vocab_size: int) -> Int64[np.ndarray, " V"]:
        """How often each id is a target that weighs more than 0."""
        lengths = self.store.lengths
        in_pair = np.arange(lengths.sum()) - np.repeat(self._starts, lengths)
        counted = in_pair >= np.repeat(self._prompt_lengths, lengths)
        counted &= np.repeat(self._weights > 0, lengths)
        return np.bincount(self.store.flat[1:][counted], minlength=vocab_size)


def encode_pairs(pairs: Pairs, tokenizer: Tokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of all prompts and of all completions, without separators."""
    return (
        tokenizer.encode_batch(list(pairs.prompts)),
        tokenizer.encode_batch(list(pairs.completions)),
    )


def hold_out(
    pairs: Pairs, fraction: float, max_validation_bytes: int
) -> Bool[np.ndarray, " pairs"]:
    """Which pairs are held out, by the hash of their prompts: a prompt is never in both parts.

    Args:
      pairs: all of them.
      fraction: share of the bytes, prompts included, to hold out.
      max_validation_bytes: hold out no more bytes.

    Raises:
      ConfigError: a single prompt, of which no part can be held out.
    """
    keys: UInt64[np.ndarray, " pairs"] = np.array(
        [splits.hash_of(prompt.encode()) for prompt in pairs.prompts],
        np.uint64,
    )
    config_lib.check(
        len(np.unique(keys)) > 1, "data.path", pairs.provenance.get("path", "pairs"),
        "holds a single prompt; give two different ones at least, so that one can be held out",
    )  # fmt: skip
    sizes = np.array(
        [len(p.encode()) + len(c.encode())
         for p, c in zip(pairs.prompts, pairs.completions, strict=True)]
    )  # fmt: skip
    budget = splits.validation_budget(int(sizes.sum()), fraction, max_validation_bytes)
    return splits.held_out(keys, keys, sizes, budget)


def fit(
    pairs: Pairs, lengths: Int64[np.ndarray, " pairs"], seq_len: int, drop_long: bool
) -> Bool[np.ndarray, " pairs"]:
    """Which pairs fit into a row.

    Raises:
      ConfigError: some do not and shall not be dropped, or none does.
    """
    here = lengths <= seq_len
    long = int((~here).sum())
    if long:
        first = pairs.name(int(np.argmin(here)))
        said = (
            f"{long} of {len(pairs)} pairs are longer than a row, the first {first}, the longest "
            f"with {int(lengths.max())} tokens; use longer rows"
        )
        config_lib.check(
            drop_long, "train.seq_len", seq_len, f"{said}, or set data.drop_long to leave them out"
        )
        config_lib.check(bool(here.any()), "train.seq_len", seq_len, said)
    return here


def pairs_dataset(
    pairs: Pairs,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    validation_fraction: float = DataConfig.validation_fraction,
    max_validation_bytes: int = DataConfig.max_validation_bytes,
    drop_long: bool = False,
) -> TextDataset:
    """Pairs as packed rows, a part of them held out.

    Bits per byte of it are over the completions' bytes; where pairs have weights, of their
    weighted mean. A unigram model is one of counted targets.

    Args:
      pairs: from a file or made by rule.
      tokenizer: text to ids.
      seq_len: S, positions of a row.
      validation_fraction, max_validation_bytes: as in ``DataConfig``.
      drop_long: leave out pairs longer than a row.

    Raises:
      ConfigError: a pair longer than a row, or nothing to hold out or to train on.
    """
    prompts, completions = encode_pairs(pairs, tokenizer)
    lengths = np.array([len(p) + len(c) + 1 for p, c in zip(prompts, completions, strict=True)])
    here = fit(pairs, lengths, seq_len, drop_long)
    numbers = np.flatnonzero(here)
    kept = chosen(pairs, numbers)
    out = hold_out(kept, validation_fraction, max_validation_bytes)
    parts = {"train": numbers[~out], "validation": numbers[out]}
    rows = {}
    for name, own in parts.items():
        store, prompt_lengths = store_of(((prompts[i], completions[i]) for i in own), tokenizer)
        weights = np.array([pairs.weight(i) for i in own], np.float32)
        rows[name] = PairRows(store, seq_len, prompt_lengths, weights)
    return dataset_of(pairs, parts, rows, tokenizer, fingerprint(pairs, parts))


def dataset_of(
    pairs: Pairs,
    parts: dict[str, Int64[np.ndarray, " n"]],
    rows: dict[str, PairRows],
    tokenizer: Tokenizer,
    found: str,
) -> TextDataset:
    """Rows of pairs as a dataset.

    Args:
      pairs: all of them; those in no part were dropped, being longer than a row.
      parts: numbers of those in ``train`` and in ``validation``.
      rows: of each part.
      tokenizer: of the rows.
      found: fingerprint of the pairs in their parts.
    """
    spelled = {name: "".join(pairs.completions[i] for i in own) for name, own in parts.items()}
    size = lambda name: len(spelled[name].encode())
    counts = {"pairs": len(pairs), **{f"{name}_pairs": len(own) for name, own in parts.items()}}
    counts["dropped_long_pairs"] = len(pairs) - sum(map(len, parts.values()))
    return TextDataset(
        tokenizer=tokenizer,
        train=rows["train"],
        validation=rows["validation"],
        train_bytes=size("train"),
        validation_bytes=size("validation"),
        fingerprint=dataset_fingerprint(found, tokenizer),
        provenance={**pairs.provenance, **counts},
        train_counts=rows["train"].target_counts(tokenizer.vocab_size),
        validation_counts=rows["validation"].target_counts(tokenizer.vocab_size),
        gzip_bytes=gzip_bytes(spelled["validation"].encode()),
    )


def open_pairs(
    config: DataConfig, seq_len: int, check_tokenizer: Callable[[Tokenizer], None]
) -> TextDataset:
    """Opens the pairs that a config names.

    Args:
      config: the block ``data``.
      seq_len: S.
      check_tokenizer: refuses one that the model cannot take.

    Raises:
      ConfigError: a path or a line of no use, see ``read_pairs`` and ``pairs_dataset``, or more
        text than fits in memory.
    """
    pairs = read_pairs(config.path)
    tokenizer = tokenizer_for(config, pairs, check_size(config, pairs))
    check_tokenizer(tokenizer)
    return pairs_dataset(
        pairs, tokenizer, seq_len, validation_fraction=config.validation_fraction,
        max_validation_bytes=config.max_validation_bytes, drop_long=config.drop_long,
    )  # fmt: skip


def check_size(config: DataConfig, *given: Pairs) -> int:
    """Bytes of all prompts and completions; raises ConfigError where they are too many."""
    total = sum(len(t.encode()) for pairs in given for t in (*pairs.prompts, *pairs.completions))
    config_lib.check(
        total <= config.max_bytes, "data.max_bytes", config.max_bytes,
        f"the pairs have {total} bytes, more than may be tokenised in memory; raise it or give "
        "fewer",
    )  # fmt: skip
    return total


def tokenizer_for(config: DataConfig, pairs: Pairs, total: int) -> Tokenizer:
    """The tokenizer that a config names; a BPE is trained on the pairs that are not held out."""
    if config.tokenizer != "bpe":
        return given_tokenizer(config)
    out = hold_out(pairs, config.validation_fraction, config.max_validation_bytes)
    own = np.flatnonzero(~out)
    recipe = (fingerprint(pairs, {"train": own}), config.bpe_vocab_size, config.bpe_sample_bytes)
    texts = (text for i in own for text in (pairs.prompts[i], pairs.completions[i]))
    sample = lambda: tokenizers.spread_sample(texts, total, config.bpe_sample_bytes)
    return trained_tokenizer(config, recipe, sample)


def chosen(pairs: Pairs, numbers: Int64[np.ndarray, " n"]) -> Pairs:
    """Some of the pairs, in their order."""
    take = lambda values: [values[i] for i in numbers] if values else ()
    return Pairs(
        take(pairs.prompts), take(pairs.completions), take(pairs.weights), take(pairs.names),
        pairs.provenance,
    )  # fmt: skip


def store_of(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer
) -> tuple[MemoryStore, Int64[np.ndarray, " n"]]:
    """Ids of prompts with their completions as a store, and how many of each are the prompt's."""
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator], dtype)
    flat, lengths, prompt_lengths = [separator], [], []
    for prompt, completion in documents:
        flat += [prompt.astype(dtype), completion.astype(dtype), separator]
        lengths.append(len(prompt) + len(completion) + 1)
        prompt_lengths.append(len(prompt))
    store = MemoryStore(np.concatenate(flat), np.array(lengths, np.int64))
    return store, np.array(prompt_lengths, np.int64)


def fingerprint(pairs: Pairs, parts: dict[str, Int64[np.ndarray, " n"]]) -> str:
    """SHA-256 over the pairs of each part, in order, with their weights."""
    digest = hashlib.sha256()
    for name, numbers in parts.items():
        digest.update(f"{name} {len(numbers)}\n".encode())
        for i in numbers:
            said = [pairs.prompts[i], pairs.completions[i], pairs.weight(i)]
            digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()
