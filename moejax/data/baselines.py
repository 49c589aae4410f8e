"""What a model has to beat: bits per byte of two simple models on the same held-out bytes."""

import gzip
import math

import numpy as np
from jaxtyping import Int64


def gzip_bytes(text: bytes) -> int:
    """Size in bytes of ``gzip -9`` of a text as one stream."""
    return len(gzip.compress(text, compresslevel=9, mtime=0))


def unigram_nats(
    train_counts: Int64[np.ndarray, " V"], held_out_counts: Int64[np.ndarray, " V"]
) -> float:
    """Cross-entropy of held-out targets under add-one-smoothed training counts, in nats in total.

    ``p(v) = (train_counts[v] + 1) / (sum(train_counts) + V)``.

    Args:
      train_counts: how often each id is a training target.
      held_out_counts: how often each id is a held-out target.
    """
    total = float(train_counts.sum()) + len(train_counts)
    return float(held_out_counts @ (math.log(total) - np.log(train_counts + 1.0)))


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Nats in total over a text, as bits for each of its UTF-8 bytes."""
    return nats / text_bytes / math.log(2)
