"""Times of several candidates in turns, so that a busy machine slows all of them alike.

The clock is read at the edges of a window of one or more calls, and only there is waited for the
device. A round is one window of each candidate; rounds are repeated until the time is used up.
"""

import concurrent.futures
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from moejax.cost.hardware import cpu_cores

Key = TypeVar("Key")
T = TypeVar("T")

# Runs a number of calls one after another and returns the seconds that they took together.
Window = Callable[[int], float]

MIN_ROUNDS, MAX_ROUNDS = 5, 200

# The shortest window: a call that takes less is repeated. Launching a GPU's work costs more.
WINDOW_SECONDS = {"cpu": 0.002, "gpu": 0.03, "tpu": 0.03}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
      seconds: time for one candidate; at least 5 rounds are measured, and at most 200.
      rounds: exactly so many instead; 0 goes by the time.
    """

    seconds: float = 1.0
    rounds: int = 0


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one call, one value a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round's time."""
        return statistics.median(self.rounds)

    def to_dict(self) -> dict[str, float]:
        """``median``, ``p10`` and ``p90``, in milliseconds."""
        quantiles = np.quantile(self.rounds, (0.1, 0.9)).tolist()
        return {"median": self.median, "p10": quantiles[0], "p90": quantiles[1]}

    def ratio_by_round(self, other: "Times") -> float:
        """Median over the rounds of this time over the other's in the same round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program with what compiling told.

    Attributes:
      call: runs it.
      compile_seconds: tracing, lowering and compiling.
      temp_bytes: what it needs beside its arguments and results; None where XLA does not tell.
      output_bytes: its results; None likewise.
      argument_bytes: its arguments; None likewise.
      alias_bytes: results that take an argument's place; None likewise.
    """

    call: Callable[..., Any]
    compile_seconds: float
    temp_bytes: int | None = None
    output_bytes: int | None = None
    argument_bytes: int | None = None
    alias_bytes: int | None = None

    @property
    def total_bytes(self) -> int | None:
        """Arguments, results and temporaries together; None where XLA does not tell."""
        if self.temp_bytes is None:
            return None
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes


def compile_program(function: Callable[..., Any], *arguments: Any, donate: tuple = ()) -> Program:
    """Compiles a function for arrays like these; nothing is run.

    Args:
      function: a pure function of arrays. Routing has to be among its arguments: XLA folds
        constants through sorts.
      arguments: arrays, or their shapes.
      donate: positions of arguments that the results may overwrite.
    """
    start = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is None:
        return Program(compiled, seconds)
    return Program(
        compiled, seconds, memory.temp_size_in_bytes, memory.output_size_in_bytes,
        memory.argument_size_in_bytes, memory.alias_size_in_bytes,
    )  # fmt: skip


def compile_side_by_side(builders: Mapping[Key, Callable[[], T]]) -> dict[Key, T | Exception]:
    """Runs functions that compile, as many at once as there are cores.

    Args:
      builders: by name; each compiles and returns what it made. Nothing may be timed meanwhile.

    Returns:
      What each returned, or the exception that it raised, in the given order.
    """

    def attempt(build: Callable[[], T]) -> T | Exception:
        try:
            return build()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(max(1, cpu_cores())) as pool:
        return dict(zip(builders, pool.map(attempt, builders.values()), strict=True))


def window_of(call: Callable[[], Any]) -> Window:
    """A window of calls that are queued without waiting, but for the last one."""

    def window(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            # Let go of before the next call, whose results may need the memory.
            result = None
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    return window


def measure(
    candidates: Mapping[str, Window], budget: Budget, window_seconds: float | None = None
) -> dict[str, Times]:
    """Times the candidates in turns, after two windows of each to warm up.

    Args:
      candidates: windows by name, already compiled.
      budget: how long.
      window_seconds: the shortest window; None takes the platform's.

    Returns:
      Milliseconds of a call, by name; every candidate has as many rounds.
    """
    if window_seconds is None:
        window_seconds = WINDOW_SECONDS.get(jax.default_backend(), max(WINDOW_SECONDS.values()))
    calls = {}
    for name, window in candidates.items():
        window(1)
        calls[name] = max(1, round(window_seconds / max(window(1), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    stop = time.perf_counter() + budget.seconds * len(candidates)
    for done in range(budget.rounds or MAX_ROUNDS):
        if not budget.rounds and done >= MIN_ROUNDS and time.perf_counter() >= stop:
            break
        for name, window in candidates.items():
            times[name].append(1e3 * window(calls[name]) / calls[name])
    return {name: Times(tuple(values)) for name, values in times.items()}
