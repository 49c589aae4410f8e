"""A pass over held-out text: its loss, and how the routers balance it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

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
    """

    loss: float
    health: dict[str, Any]


def validate(
    step: Callable[[TrainState, Batch], EvalMetrics], state: TrainState, batches: Iterable[Batch]
) -> Validation:
    """Runs an evaluation step over batches; sums are kept on the host, in float64.

    Args:
      step: from ``make_eval_step``, compiled.
      state: the state to judge.
      batches: on the devices; at least one.
    """
    nll = targets = 0.0
    stats, loads = None, []
    for seen in _one_late(step(state, batch) for batch in batches):
        nll, targets = nll + float(seen.nll), targets + float(seen.targets)
        own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), seen.router_stats)
        stats = own if stats is None else jax.tree.map(np.add, stats, own)
        if own:
            loads.append(stack_layers(own)["load"])
    return Validation(nll / targets, held_out_health(stats, loads))


def _one_late(results: Iterator[EvalMetrics]) -> Iterator[EvalMetrics]:
    """Fetches a batch's sums while the next one is computed."""
    before = None
    for result in results:
        if before is not None:
            yield jax.device_get(before)
        before = result
    yield jax.device_get(before)
