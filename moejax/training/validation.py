"""A pass over held-out text: its loss, and how the routers balance it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from moejax.data import Rows, TextDataset
from moejax.moe.diagnostics import held_out_health, stack_layers
from moejax.training.state import TrainState
from moejax.training.step import Batch, EvalMetrics


class ValidationStopped(Exception):
    """Raised by batches that are to end before held-out text does."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """What held-out text told.

    Attributes:
      loss: nats per target.
      health: of the routers, see ``held_out_health``; empty for a dense model.
      sources: nats per target of each source of a mixture, by label.
    """

    loss: float
    health: dict[str, Any]
    sources: dict[str, float] = dataclasses.field(default_factory=dict)


def bits_per_byte(loss: float, dataset: TextDataset) -> float:
    """Nats per held-out target, over the bytes that a held-out target of the text stands for."""
    return loss / math.log(2) * dataset.validation_tokens / dataset.validation_bytes


def validate_dataset(
    step: Callable[[TrainState, Batch], EvalMetrics],
    state: TrainState,
    dataset: TextDataset,
    batches: Callable[[Rows], Iterable[Batch]],
) -> Validation:
    """Runs an evaluation step over a dataset's held-out text.

    A mixture's sources are run one after another, and its loss is theirs by the targets that each
    of them holds out: that of all held-out text, each target once.

    Args:
      step: from ``make_eval_step``, compiled.
      state: the state to judge.
      dataset: the text.
      batches: gives the batches of held-out rows, on the devices; called once for each source.
    """
    if not dataset.parts:
        return validate(step, state, batches(dataset.validation))
    sums, sources = _Sums(), {}
    for part in dataset.parts:
        own = _Sums()
        for seen in _one_late(step(state, batch) for batch in batches(part.dataset.validation)):
            own.add(seen)
            sums.add(seen)
        sources[part.label] = own.loss
    total = sum(part.dataset.validation_tokens * sources[part.label] for part in dataset.parts)
    return Validation(total / dataset.validation_tokens, sums.health(), sources)


def validate(
    step: Callable[[TrainState, Batch], EvalMetrics], state: TrainState, batches: Iterable[Batch]
) -> Validation:
    """Runs an evaluation step over batches; sums are kept on the host, in float64.

    Args:
      step: from ``make_eval_step``, compiled.
      state: the state to judge.
      batches: on the devices; at least one.
    """
    sums = _Sums()
    for seen in _one_late(step(state, batch) for batch in batches):
        sums.add(seen)
    return Validation(sums.loss, sums.health())


class _Sums:
    """Sums over batches, on the host."""

    def __init__(self):
        self._nll = self._targets = 0.0
        self._stats, self._loads = None, []

    def add(self, seen: EvalMetrics) -> None:
        """Adds a batch's sums."""
        self._nll, self._targets = self._nll + float(seen.nll), self._targets + float(seen.targets)
        own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), seen.router_stats)
        self._stats = own if self._stats is None else jax.tree.map(np.add, self._stats, own)
        if own:
            self._loads.append(stack_layers(own)["load"])

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self._nll / self._targets

    def health(self) -> dict[str, Any]:
        """Of the routers, over all batches."""
        return held_out_health(self._stats, self._loads)


def _one_late(results: Iterator[EvalMetrics]) -> Iterator[EvalMetrics]:
    """Fetches a batch's sums while the next one is computed."""
    before = None
    for result in results:
        if before is not None:
            yield jax.device_get(before)
        before = result
    yield jax.device_get(before)
