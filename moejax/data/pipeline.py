"""From packed rows to batches: shuffled by seed, sharded by process, resumed by one integer."""

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Int32, Shaped

from moejax import config
from moejax.data.mixing import MixedRows
from moejax.data.packing import Row, Rows, padding_row

Batch = dict[str, Int32[np.ndarray, "B S"]]


def _stack(rows: list[Row]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class TrainIterator:
    """Endless batches of training rows; see ``train_iterator``."""

    def __init__(self, batches, position: int):
        self._batches, self._position = batches, position

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._position += 1
        return batch

    @property
    def position(self) -> int:
        """Global batches consumed since the start of the run; a checkpoint keeps this."""
        return self._position

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._batches.close()


def _order(rows: Rows | MixedRows, seed: int):
    """Numbers of rows without end, as a grain MapDataset: shuffled anew each epoch.

    Each source of a mixture has epochs of its own, under a seed of its own.
    """
    import grain  # slow to import, and a plan does not need it

    if not isinstance(rows, MixedRows):
        return grain.MapDataset.range(len(rows)).seed(seed % 2**32).shuffle().repeat()
    starts = rows.starts.tolist()
    seeds = np.random.SeedSequence(seed % 2**32).generate_state(len(rows.parts))
    orders = [
        grain.MapDataset.range(start, stop).seed(int(own)).shuffle().repeat()
        for start, stop, own in zip(starts[:-1], starts[1:], seeds, strict=True)
    ]
    return grain.MapDataset.select_from_datasets(orders, rows.schedule)


def train_iterator(
    rows: Rows | MixedRows,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    take: Int[np.ndarray, " n"] | None = None,
    prefetch: int = 2,
) -> TrainIterator:
    """Endless batches: every epoch is a new permutation of the rows, and none is dropped.

    Batch ``n`` is a function of ``rows``, ``batch_size``, ``seed`` and ``n`` alone, so an iterator
    with ``start=n`` gives exactly the batches that an uninterrupted run sees from ``n`` on, on
    however many processes. A batch may reach over the end of an epoch. The sources of a mixture
    are drawn from by its schedule: see ``MixedRows``.

    Args:
      rows: packed training rows, of one source or of several.
      batch_size: B, rows of the global batch.
      seed: of the shuffle.
      start: global batches already consumed.
      take: numbers of the global batch's rows that this process reads; None reads them all.
      prefetch: batches made ahead on threads; 0 makes each when it is asked for.

    Returns:
      An iterator over dictionaries of (B or n, S) int32 arrays: ``tokens``, ``targets``,
      ``segment_ids``, ``positions``; of rows with weights also ``weights``, float32.

    Raises:
      ConfigError: fewer rows than one batch.
    """
    import grain  # slow to import, and a plan does not need it

    own = slice(None) if take is None else take
    config.check(
        len(rows) >= batch_size,
        "train.batch_size",
        batch_size,
        f"is more than the {len(rows)} rows of training text; "
        "use a smaller batch, a shorter train.seq_len or more text",
    )
    # Only row numbers are shuffled and batched; a process then reads its own rows.
    batches = (
        _order(rows, seed)
        # There is no remainder. Told to keep one, grain rounds the length up, beyond what Python
        # can count where a batch is one row.
        .batch(batch_size, drop_remainder=True)
        .map(lambda numbers: _stack([rows[int(number)] for number in numbers[own]]))
    )
    options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return TrainIterator(iterator, start)


def validation_batches(
    rows: Rows,
    *,
    batch_size: int,
    max_batches: int | None = None,
    take: Int[np.ndarray, " n"] | None = None,
) -> Iterator[Batch]:
    """The held-out rows in order, each once, or a sample of their batches.

    Args:
      rows: packed validation rows.
      batch_size: B, rows of the global batch.
      max_batches: take at most so many, evenly spaced; None takes all.
      take: numbers of the global batch's rows that this process reads; None reads them all.

    Yields:
      As ``train_iterator``; the last batch is filled up with rows of padding (``segment_ids`` 0),
      so that every batch has the same shape.
    """
    own = range(batch_size) if take is None else take.tolist()
    count = -(-len(rows) // batch_size)
    taken = count if max_batches is None else min(count, max_batches)
    # Neighbouring rows are of like length and of the same documents: a sample has to be spread.
    for batch in (i * count // taken for i in range(taken)):
        numbers = (batch * batch_size + row for row in own)
        empty = padding_row(rows.seq_len, rows.weighted)
        yield _stack([rows[i] if i < len(rows) else empty for i in numbers])


def batch_fingerprint(batch: dict[str, Shaped[np.ndarray, "..."]]) -> str:
    """SHA-256 of the tokens of a batch, in hexadecimal: which batch it was."""
    return hashlib.sha256(np.ascontiguousarray(batch["tokens"], np.int32).tobytes()).hexdigest()
