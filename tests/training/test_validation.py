"""A pass over held-out text: sums over batches, by hand."""

import numpy as np
import pytest

from moejax.training.step import EvalMetrics
from moejax.training.validation import validate


def stats(load, tokens):
    """One layer's sums; what is not looked at here is zero."""
    names = ("assignments", "entropy", "dropped")
    zeros = {name: np.zeros(1, np.float32) for name in names}
    load = np.asarray([load], np.float32)
    layer = {**zeros, "load": load, "gate_mass": load, "tokens": np.float32([tokens])}
    return {"segment_0": {"layer_0": layer}}


def test_sums_and_balance_over_batches():
    # 30 nats over 10 targets, not the mean of 2 and 6.
    batches = {
        "first": EvalMetrics(np.float32(12), np.float32(6), stats([8, 0], 6)),
        "second": EvalMetrics(np.float32(18), np.float32(4), stats([4, 12], 4)),
    }
    asked = []

    def step(state, batch):
        asked.append((state, batch))
        return batches[batch]

    found = validate(step, "state", iter(batches))
    assert asked == [("state", "first"), ("state", "second")]
    assert found.loss == pytest.approx(3)
    # 12 and 12 together; MaxVio 1 and 1/2 alone.
    assert found.health["max_violation_global"] == 0
    assert found.health["max_violation_batch"] == 0.75


def test_a_dense_model_has_a_loss_alone():
    found = validate(lambda _, batch: batch, None, [EvalMetrics(np.ones(()), np.ones(()), {})])
    assert found.loss == 1 and found.health == {}
