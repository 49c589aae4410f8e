"""Text to batches: sources, tokenizers, packing, and the input pipeline.

    documents, stdlib_corpus, tfds_source   a source as a stream of documents
    splits       what is held out, by hash; the fingerprint of a corpus
    tokenizers   bytes, byte-pair encoding, tokenizer.json
    store        tokens by random access: in memory, or in ArrayRecord shards
    packing      documents in rows of S, every token a target exactly once
    pipeline     shuffled, sharded, resumable batches
    pretokenize  `moejax tokenize`: shards written from any source
    dataset      all of it put together by ``open_dataset``

One way through: config -> corpus -> split -> tokenizer -> store -> rows -> batches.
"""

from moejax.data.data_config import DataConfig
from moejax.data.dataset import TextDataset, baselines, epochs, open_dataset
from moejax.data.packing import Rows
from moejax.data.pipeline import (
    TrainIterator,
    batch_fingerprint,
    train_iterator,
    validation_batches,
)

__all__ = [
    "DataConfig",
    "Rows",
    "TextDataset",
    "TrainIterator",
    "baselines",
    "batch_fingerprint",
    "epochs",
    "open_dataset",
    "train_iterator",
    "validation_batches",
]
