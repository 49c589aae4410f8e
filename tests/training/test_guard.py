"""The divergence guard: what is bad, what is good, and runs that go back from a bad batch."""

import dataclasses
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import parameters, summary, write_config

from moejax.config import ConfigError
from moejax.cost.bill import read
from moejax.data import batch_fingerprint
from moejax.training import guard, run_config
from moejax.training.failures import Diverged, NonFiniteLoss
from moejax.training.guard import BadStep, Guard, GuardConfig, Skipping
from moejax.training.loop import Run
from moejax.training.metrics import read_metrics
from moejax.training.programs import ProgramCache
from moejax.training.train import train

# What is judged


def bad(step, position=None):
    position = step - 1 if position is None else position
    return BadStep(step, "a test", math.nan, 1.0, position, {})


def test_what_is_not_finite_is_bad_from_the_first_step():
    judge = Guard(GuardConfig()).judge
    assert judge(1.0, 1.0) is None and judge(1e9, 1e9) is None
    assert judge(math.nan, 1.0) == "loss nan, gradient norm 1.0"
    assert judge(1.0, math.inf) is not None and judge(-math.inf, 1.0) is not None


def test_a_spike_by_hand():
    """Median 3, deviations 2 1 0 1 2: their median is 1, and 3 + 4 x 1 = 7 is the most."""
    watching = Guard(GuardConfig(spike=4.0, window=5))
    for loss in (1.0, 100.0, 4.0, 2.0, 3.0, 5.0, 1.0):  # 100 comes before there is a window
        assert watching.judge(loss, 1.0) is None
    assert list(watching._losses) == [4.0, 2.0, 3.0, 5.0, 1.0]
    assert watching.judge(7.01, 1.0) == (
        "loss 7.01 is above 7, the median of 5 steps (3) and 4 times their deviation"
    )
    assert watching.judge(7.0, 1.0) is None  # the bad one was not taken into the window
    assert watching.judge(0.0, 1.0) is None  # below is never bad


def test_the_noise_of_a_converged_run_is_no_spike():
    rng = random.Random(0)
    watching = Guard(GuardConfig(spike=8.0, window=20))
    for _ in range(2000):
        assert watching.judge(2.0 + rng.gauss(0, 1e-4), 1.0) is None
    assert watching.judge(2.1, 1.0) is None  # 8 x 1 % of 2
    assert watching.judge(2.2, 1.0) is not None
    memorised = Guard(GuardConfig(spike=8.0, window=4))
    for loss in (0.0, 0.0, 0.0, 0.0, 0.07):
        assert memorised.judge(loss, 1.0) is None
    assert memorised.judge(0.1, 1.0) is not None


def test_what_a_good_checkpoint_is():
    watching = Guard(GuardConfig(action="rewind"))
    assert [s for s in range(10) if watching.is_good(s, bad_step=7)] == [0, 1, 2, 3, 4, 5]
    assert watching.is_good(0, bad_step=1)  # nothing made it bad
    watching.rewind(bad(7), 4, 4)
    # Gone back to 4, and no further than before: 4 itself is bad.
    assert [s for s in range(10) if watching.is_good(s, bad_step=7)] == [0, 1, 2, 3, 5]
    assert not watching.is_good(4, bad_step=6) and watching.is_good(4, bad_step=8)


@pytest.mark.parametrize(
    "skip, position, begin, skipped",
    [(1, 9, 0, [9]), (2, 9, 0, [8, 9]), (3, 9, 0, [8, 9, 10]), (4, 1, 0, [0, 1, 2, 3]),
     (6, 9, 8, [8, 9, 10, 11, 12, 13])],
)  # fmt: skip
def test_which_batches_are_left_out(skip, position, begin, skipped):
    watching = Guard(GuardConfig(action="rewind", skip=skip))
    assert watching.rewind(bad(10, position), 0, begin)["skipped"] == skipped
    assert watching.skipped == set(skipped)


class Counted:
    """Batches 0, 1, 2 … and their position."""

    def __init__(self, start=0):
        self.position = start

    def __next__(self):
        self.position += 1
        return self.position - 1


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 30), max_size=12), st.integers(0, 25))
def test_a_resumed_iterator_leaves_out_the_same_batches(skipped, taken):
    whole = Skipping(Counted(), skipped)
    seen = [next(whole) for _ in range(40)]
    assert seen == [n for n in range(80) if n not in skipped][:40]
    first = Skipping(Counted(), skipped)
    before = [next(first) for _ in range(taken)]
    second = Skipping(Counted(first.position), skipped)
    assert before + [next(second) for _ in range(40 - taken)] == seen


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=40), st.integers(0, 39))
def test_a_resumed_guard_judges_alike(losses, cut):
    config = GuardConfig(spike=2.0, window=5)
    whole, first = Guard(config), Guard(config)
    judged = [whole.judge(loss, 1.0) for loss in losses]
    for loss in losses[:cut]:
        first.judge(loss, 1.0)
    second = Guard(config)
    second.load(json.loads(json.dumps(first.state())))
    assert [second.judge(loss, 1.0) for loss in losses[cut:]] == judged[cut:]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"action": "rewnd"}, "guard.action = 'rewnd': must be one of stop, rewind"),
        ({"spike": -1.0}, "guard.spike"),
        ({"window": 3}, "guard.window = 3: is too short"),
        ({"skip": 0}, "guard.skip"),
        ({"most_rewinds": 0}, "guard.most_rewinds"),
    ],
)
def test_a_config_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        GuardConfig(**values)


# Whole runs


class Poisoned(ProgramCache):
    """The compiled programs of another cache, and batches that ruin a step.

    Args:
      cache: shared by the tests.
      batches: fingerprints of batches that make the loss NaN and the parameters with it.
      late: fingerprints of batches whose own loss is fine, and whose update ruins the parameters.
      steps: steps whose loss is NaN whatever the batch.
    """

    def __init__(self, cache, batches=(), late=(), steps=()):
        self._cache, self._batches, self._late, self._steps = cache, batches, late, steps

    def get(self, setup):
        programs = self._cache.get(setup)

        def step(state, batch, hyper):
            tokens = np.asarray(jax.device_get(batch.tokens))
            name = batch_fingerprint({"tokens": tokens.reshape(-1, tokens.shape[-1])})
            number = int(jax.device_get(state.step)) + 1
            state, metrics = programs.train_step(state, batch, hyper)
            ruined = lambda by: state.replace(params=jax.tree.map(lambda x: x * by, state.params))
            with jax.transfer_guard("allow"):
                if name in self._batches or number in self._steps:
                    return ruined(jnp.nan), metrics.replace(loss=jnp.float32(jnp.nan))
                return (ruined(-2.0) if name in self._late else state), metrics

        return dataclasses.replace(programs, train_step=step)


@pytest.fixture(scope="module")
def cache():
    return ProgramCache()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = write_config(tmp_path_factory.mktemp("config"))
    settings = ["train.steps=14", "checkpoint.every_steps=3", "checkpoint.keep_newest=3",
                "guard.action=rewind", "data.prefetch=0"]  # fmt: skip
    return run_config.load(str(file), settings)


def changed(config, **blocks):
    made = {name: dataclasses.replace(getattr(config, name), **v) for name, v in blocks.items()}
    return dataclasses.replace(config, **made)


@pytest.fixture(scope="module")
def batches(base):
    """Fingerprints of the run's batches, by position."""
    from moejax.data import train_iterator
    from moejax.training.prepare import prepare

    rows = prepare(base).dataset.train
    found = train_iterator(rows, batch_size=8, seed=base.seed, prefetch=0)
    return [batch_fingerprint(next(found)) for _ in range(30)]


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}


@pytest.fixture(scope="module")
def skipped_from_the_start(base, cache, tmp_path_factory):
    """A run that never sees batches 8 and 9."""
    workdir = tmp_path_factory.mktemp("runs") / "reference"

    class Without(Skipping):
        def __init__(self, batches, skipped):
            super().__init__(batches, {8, 9})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moejax.training.loop.Skipping", Without)
        train(base, str(workdir), programs=cache)
    return workdir


def test_it_goes_back_and_comes_to_what_the_run_without_those_batches_comes_to(
    base, cache, batches, skipped_from_the_start, tmp_path, capsys
):
    """Batch 9 is bad: step 10. Checkpoints of steps 3, 6 and 9; the loss of step 10 is the first
    that was computed on the state of step 9, which might be what is bad: back to 6."""
    workdir = tmp_path / "run"
    compiled = []
    train(base, str(workdir), programs=cache)  # whatever is compiled once, is now
    listen = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    poisoned = Poisoned(cache, batches=[batches[9]])
    workdir = tmp_path / "again"
    train(base, str(workdir), programs=poisoned)
    said = capsys.readouterr().err
    assert (
        "guard: step 10: loss nan, gradient norm" in said
        and "going back to step 6, and batches 8 to 9 are left out (rewind 1 of at most 3)" in said
    )
    assert "given up: checkpoints of steps 9" in said
    result = summary(workdir)
    assert (result["status"], result["step"]) == ("completed", 14)
    assert (result["rewinds"], result["skipped_batches"]) == (1, 2)
    for got, wanted in zip(parameters(workdir), parameters(skipped_from_the_start), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert losses(workdir) == losses(skipped_from_the_start)
    assert result["tokens"] == summary(skipped_from_the_start)["tokens"]
    # Steps 7 to 10, and 11, which was on its way: trained and thrown away.
    bill = read(workdir)
    assert bill["redone"]["steps"] == 5 and bill["redone"]["dollars"] > 0
    assert bill["tokens_seen"] == result["tokens"] == bill["tokens"] - bill["redone"]["tokens"]
    record = json.loads((workdir / "divergence.json").read_text())
    assert (record["step"], record["last_good_checkpoint"], record["batch_position"]) == (10, 6, 9)
    assert record["batch_fingerprint"] == batches[9]
    # A third time, all but the poison is warm: nothing is compiled.
    jax.monitoring.register_event_duration_secs_listener(listen)
    train(base, str(tmp_path / "third"), programs=poisoned)
    assert compiled == []


def test_a_run_that_was_stopped_after_it_went_back_sees_the_same_batches(
    base, cache, batches, skipped_from_the_start, tmp_path
):
    """Stopped by its budget at once after the checkpoint that followed, by which the process that
    goes on knows."""
    workdir = tmp_path / "run"
    poisoned = Poisoned(cache, batches=[batches[9]])
    flops = read_metrics(skipped_from_the_start)[-2]["model_flops"]
    limit = changed(base, budget={"max_flops": flops * 1.2})
    train(limit, str(workdir), programs=poisoned)
    stopped = summary(workdir)
    assert stopped["status"] == "budget" and 9 < stopped["step"] < 14
    train(base, str(workdir), programs=poisoned)
    result = summary(workdir)
    assert (result["rewinds"], result["skipped_batches"]) == (1, 2)
    assert losses(workdir) == losses(skipped_from_the_start)
    for got, wanted in zip(parameters(workdir), parameters(skipped_from_the_start), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_checkpoint_that_a_bad_update_made_is_not_gone_back_to(
    base, cache, batches, tmp_path, capsys
):
    """Batch 8 ruins the parameters in step 9, whose own loss is fine: the checkpoint of step 9 is
    saved, and bad. Its loss of step 10 says so."""
    config = changed(base, guard={"spike": 6.0, "window": 4})
    train(config, str(tmp_path / "run"), programs=Poisoned(cache, late=[batches[8]]))
    said = capsys.readouterr().err
    assert "guard: step 10: loss" in said and "the median of 4 steps" in said
    assert "going back to step 6, and batches 8 to 9 are left out" in said
    result = summary(tmp_path / "run")
    assert result["status"] == "completed" and result["rewinds"] == 1
    assert max(losses(tmp_path / "run").values()) < 7


def test_without_a_checkpoint_it_begins_again(base, cache, batches, tmp_path, capsys):
    config = changed(base, checkpoint={"every_steps": 0}, guard={"skip": 1})
    train(config, str(tmp_path / "run"), programs=Poisoned(cache, batches=[batches[4]]))
    assert "going back to step 0, and batch 4 is left out" in capsys.readouterr().err
    assert summary(tmp_path / "run")["status"] == "completed"
    assert read(tmp_path / "run")["redone"]["steps"] == 6


def test_a_checkpoint_that_leads_nowhere_twice_is_left_and_then_the_run_stops(
    base, cache, tmp_path, capsys
):
    """Step 10 is bad whatever its batch: from 6, then 3; then nothing is good."""
    with pytest.raises(NonFiniteLoss, match="step 10: loss nan") as error:
        train(base, str(tmp_path / "run"), programs=Poisoned(cache, steps=[10]))
    said = capsys.readouterr().err
    assert "going back to step 6" in said and "going back to step 3" in said
    assert "none that is kept was saved early enough" in str(error.value)
    result = summary(tmp_path / "run")
    assert (result["status"], result["rewinds"], result["skipped_batches"]) == ("failed", 2, 4)
    assert read(tmp_path / "run")["redone"]["steps"] > 5


def test_the_most_rewinds_are_counted_over_processes(base, cache, batches, tmp_path, capsys):
    config = changed(base, guard={"most_rewinds": 1})
    poisoned = Poisoned(cache, batches=[batches[5], batches[13]])
    with pytest.raises(NonFiniteLoss, match="the run went back 1 times"):
        train(config, str(tmp_path / "run"), programs=poisoned)
    assert summary(tmp_path / "run")["rewinds"] == 1
    # The checkpoint after the first rewind knows of it, and the next process by that.
    with pytest.raises(NonFiniteLoss, match="the run went back 1 times"):
        train(config, str(tmp_path / "run"), programs=poisoned)


def test_a_spike_stops_a_run_that_is_to_stop(base, cache, batches, tmp_path):
    config = changed(base, guard={"action": "stop", "spike": 6.0, "window": 4})
    with pytest.raises(Diverged, match=r"step 10: loss .* is above .*checkpoint 6 is good"):
        train(config, str(tmp_path / "run"), programs=Poisoned(cache, late=[batches[8]]))
    assert summary(tmp_path / "run")["status"] == read(tmp_path / "run")["status"] == "failed"


def test_a_rewind_needs_the_checkpoint_before_the_newest(base):
    with pytest.raises(ConfigError, match=r"checkpoint.keep_newest = 1: is too few for guard"):
        changed(base, checkpoint={"keep_newest": 1})


def test_validation_that_is_not_finite_fails_the_run(base, cache, tmp_path, monkeypatch):
    real = Run._validate

    def ruined(run, *arguments):
        done = real(run, *arguments)
        run.val_loss = math.nan
        return done

    monkeypatch.setattr(Run, "_validate", ruined)
    with pytest.raises(NonFiniteLoss, match="the last validation's loss is nan"):
        train(base, str(tmp_path / "run"), programs=cache)
    assert guard.ACTIONS == ("stop", "rewind")
