"""What several processes read of the same batches, put together again."""

from collections.abc import Sequence

import numpy as np

from moejax.data import train_iterator


def read(rows, count: int, *, processes: int = 1, **options) -> list[dict[str, np.ndarray]]:
    """The next ``count`` global batches as ``processes`` processes read them, joined.

    Args:
      rows: packed rows, of one source or of several.
      count: batches.
      processes: each reads its own part through an iterator of its own; they divide the batch.
      options: of ``train_iterator``: ``batch_size``, ``seed``, ``start``, ``prefetch``.
    """
    parts: list[Sequence[dict[str, np.ndarray]]] = []
    for process in range(processes):
        own = np.arange(process, options["batch_size"], processes)
        iterator = train_iterator(rows, take=own, **options)
        parts.append([next(iterator) for _ in range(count)])
        assert iterator.position == options.get("start", 0) + count
        iterator.close()
    # Process p reads every p-th row: put side by side and read across, they are in order again.
    joined = lambda step, name: np.stack([part[name] for part in step], axis=1)
    return [
        {name: joined(step, name).reshape(options["batch_size"], -1) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    """Two batches are equal in every field."""
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def assert_input_keeps_up(summary: dict, most: float = 0.01) -> None:
    """A run's summary says that it waited for input in less than 1 % of its steps' time."""
    share = summary["data_wait_share"]
    assert share is not None and 0 <= share < most, f"waited for input in {share} of the time"
