"""What the command does beside the suites: shapes by platform, the model beside the layers."""

import os

import pytest

from moejax.bench import command, model_suite, moe_suite
from moejax.bench.models import MODELS
from moejax.bench.options import BenchOptions
from moejax.bench.report import Report
from moejax.bench.shapes import SHAPES


@pytest.fixture
def ran(monkeypatch):
    """The suites that were run, with options and the names of shapes."""
    calls = []
    names = lambda shapes: [shape.name for shape in shapes]
    record = lambda suite: lambda options, shapes, *_: calls.append((suite, options, names(shapes)))
    monkeypatch.setattr(moe_suite, "run", record("moe"))
    monkeypatch.setattr(model_suite, "run", record("model"))
    return calls


def run(tmp_path, platform, **changes):
    command._run_suite(BenchOptions(**changes), platform, tmp_path, Report())


def test_shapes_by_platform(ran, tmp_path):
    run(tmp_path, "cpu")
    run(tmp_path, "gpu")
    run(tmp_path, "cpu", suite="model")
    run(tmp_path, "gpu", suite="model")
    small = lambda table: [name for name, shape in table.items() if not shape.needs_gpu]
    assert [names for _, _, names in ran] == [
        small(SHAPES), list(SHAPES), small(MODELS), list(MODELS)
    ]  # fmt: skip
    assert "sonicmoe" in SHAPES and "sonicmoe" not in small(SHAPES)


def test_against_adds_the_whole_model_to_the_layers(ran, tmp_path):
    shape = ("T8-D4-F4-E2-K1",)
    run(tmp_path, "cpu", shapes=shape, against="transformers", dispatch=("capacity",))
    (_, _, layers), (suite, options, models) = ran
    assert layers == list(shape) and (suite, models) == ("model", ["olmoe_tiny"])
    # The layers' loads and dispatchers are not the model's.
    assert options.loads == ("untrained", "balanced", "skewed") and options.dispatch == ()
    assert options.against == "transformers"


def test_a_peer_gets_its_share_of_a_cards_memory(monkeypatch):
    """jax would take three quarters of the card before the peer has asked for any."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    command.leave_memory_for_a_peer()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    command.leave_memory_for_a_peer()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
