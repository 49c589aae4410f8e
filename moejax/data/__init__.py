"""Text to batches: sources, tokenizers, packing, and the input pipeline.

    documents, stdlib_corpus, tfds_source   a source as a stream of documents
    splits       what is held out, by hash; the fingerprint of a corpus
    tokenizers   bytes, byte-pair encoding, tokenizer.json
    duplicates   documents that occur more than once
    store        tokens by random access: in memory, or in ArrayRecord shards
    packing      documents in rows of S, every token a target exactly once
    pairs        prompts and completions in rows of S, the loss on completions
    preferences  two responses to a prompt, one row a pair
    pair_files   their JSONL
    pipeline     shuffled, sharded, resumable batches
    pretokenize  `moejax tokenize`: shards written from any source
    mixing       shares by weight and temperature, and the schedule by which sources are drawn
    mixture      several sources under one tokenizer
    dataset      all of it put together by ``open_dataset``

One way through: config -> corpus -> split -> tokenizer -> store -> rows -> batches.
"""

from moejax.data.data_config import DataConfig, SourceConfig
from moejax.data.dataset import TextDataset, baselines, epochs, epochs_read, open_dataset
from moejax.data.mixing import MixedRows
from moejax.data.packing import Rows
from moejax.data.pair_files import Pairs, read_pairs, read_preferences, write_pairs
from moejax.data.pairs import PairRows, pairs_dataset
from moejax.data.pipeline import (
    TrainIterator,
    batch_fingerprint,
    train_iterator,
    validation_batches,
)

__all__ = [
    "DataConfig",
    "MixedRows",
    "PairRows",
    "Pairs",
    "Rows",
    "SourceConfig",
    "TextDataset",
    "TrainIterator",
    "baselines",
    "batch_fingerprint",
    "epochs",
    "epochs_read",
    "open_dataset",
    "pairs_dataset",
    "read_pairs",
    "read_preferences",
    "train_iterator",
    "validation_batches",
    "write_pairs",
]
