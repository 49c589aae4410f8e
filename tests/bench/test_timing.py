"""The stopwatch, with candidates that tell it what they took."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.bench import timing
from moejax.bench.timing import Budget, Times


class Fake:
    """A window that says it took so long a call, and keeps a list of what was run."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log

    def __call__(self, calls):
        self.log.append((self.name, calls))
        return calls * self.seconds


def test_candidates_take_turns_and_short_ones_are_repeated():
    log = []
    windows = {"slow": Fake("slow", 0.5, log), "fast": Fake("fast", 0.001, log)}
    times = timing.measure(windows, Budget(rounds=3), window_seconds=0.01)
    # Two calls each to warm up, then rounds; the fast one is called ten times a window.
    assert log == [("slow", 1)] * 2 + [("fast", 1)] * 2 + [("slow", 1), ("fast", 10)] * 3
    assert times["slow"].rounds == (500.0,) * 3
    assert times["fast"].rounds == pytest.approx((1.0,) * 3)


def test_the_time_decides_how_many_rounds_but_five_at_least(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    window = Fake("a", 1.0, [])
    # The clock ticks once a round: 40 seconds are used up after about 40 rounds.
    count = lambda seconds: len(timing.measure({"a": window}, Budget(seconds), 0.01)["a"].rounds)
    assert count(1.0) == timing.MIN_ROUNDS
    assert timing.MIN_ROUNDS < count(40.0) <= 50
    assert count(1e9) == timing.MAX_ROUNDS


def test_quantiles_and_ratios():
    times = Times(tuple(float(i) for i in range(1, 12)))
    assert times.to_dict() == {"median": 6.0, "p10": 2.0, "p90": 10.0}
    # A machine that slows down threefold half-way: in turns, the ratio stays.
    slowing = np.r_[np.ones(5), 3 * np.ones(5)]
    base, double = Times(tuple(slowing)), Times(tuple(2 * slowing))
    assert double.ratio_by_round(base) == 2.0
    with pytest.raises(ValueError):
        times.ratio_by_round(base)


def test_a_compiled_program_and_its_memory():
    matrix = jnp.ones((64, 32))
    program = timing.compile_program(lambda a: jnp.tanh(a @ a.T) @ a, matrix)
    assert program.call(matrix).shape == (64, 32)
    assert program.compile_seconds > 0
    assert program.argument_bytes == program.output_bytes == 64 * 32 * 4
    assert program.temp_bytes >= 64 * 64 * 4
    assert program.total_bytes == 2 * 64 * 32 * 4 + program.temp_bytes


def test_a_window_runs_its_calls_and_waits():
    done = []

    def call():
        done.append(1)
        return jnp.zeros(3) + len(done)

    assert timing.window_of(call)(4) > 0
    assert len(done) == 4


def test_a_donated_argument_is_overwritten():
    program = timing.compile_program(lambda a: a + 1, jnp.ones(1000), donate=(0,))
    values = jnp.ones(1000)
    run = functools.partial(program.call, values)
    jax.block_until_ready(run())
    assert values.is_deleted()
    assert program.alias_bytes == 4000
