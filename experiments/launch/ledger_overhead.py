"""How much of a training step the ledger takes, measured in a run.

    python experiments/launch/ledger_overhead.py --config=FILE [--config.FIELD=VALUE ...]

Every call that the training loop makes is timed from outside, while the ledger's own thread writes
as ever. Prints one JSON object: steps, calls and seconds in the ledger for each step, seconds of a
step, the share of the one in the other (``loop_share``); and of the ledger's own thread its CPU
seconds over the same time (``thread_share``), which no step waits for unless all cores are busy.
"""

import argparse
import collections
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from moejax.cost.ledger import Ledger

CALLS = ("enter", "add", "add_exchange")
READ = ("seconds", "tokens", "flops", "total_dollars", "total_flops", "total_hours")


class Stopwatch:
    """Sums up time inside the ledger's calls, of the loop's thread; inner calls belong to outer."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.seconds = self.thread_seconds = 0.0
        self._depth = 0
        self._loop = threading.get_ident()

    def timed(self, name: str, call: Any) -> Any:
        """A function of the ledger, timed."""

        def wrapper(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != self._loop or self._depth:
                return call(*arguments, **named)
            self._depth += 1
            begun = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - begun
                self.calls[name] += 1
                self._depth -= 1

        return wrapper

    def timed_thread(self, flush: Any) -> Any:
        """The ledger's flush, whose CPU time counts where its own thread calls it."""

        def wrapper(*arguments: Any, **named: Any) -> Any:
            begun = time.thread_time()
            try:
                return flush(*arguments, **named)
            finally:
                if threading.get_ident() != self._loop:
                    self.thread_seconds += time.thread_time() - begun

        return wrapper


@contextlib.contextmanager
def patched(watch: Stopwatch) -> Iterator[None]:
    """The ledger's class with its calls timed."""
    before = {name: Ledger.__dict__[name] for name in (*CALLS, *READ, "_flush")}
    for name in CALLS:
        setattr(Ledger, name, watch.timed(name, before[name]))
    for name in READ:
        setattr(Ledger, name, property(watch.timed(name, before[name].fget)))
    Ledger._flush = watch.timed_thread(before["_flush"])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(Ledger, name, value)


def main(arguments: list[str]) -> dict[str, Any]:
    """Trains as the flags say; returns what is printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    options = parser.parse_args([a for a in arguments if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    from moejax.training import run_config
    from moejax.training.loop import Run
    from moejax.training.train import train

    watch, inside = Stopwatch(), {}
    loop = Run.train

    def timed_loop(run: Run) -> str:
        watch.seconds = watch.thread_seconds = 0.0
        watch.calls.clear()
        begun = time.perf_counter()
        status = loop(run)
        inside.update(
            seconds=time.perf_counter() - begun, steps=run.step, ledger=watch.seconds,
            thread=watch.thread_seconds, calls=dict(watch.calls),
        )  # fmt: skip
        return status

    Run.train = timed_loop
    with tempfile.TemporaryDirectory() as folder, patched(watch):
        train(run_config.load(options.config, overrides), folder)
    steps = inside["steps"]
    return {
        "steps": steps,
        "calls_per_step": {name: round(n / steps, 2) for name, n in inside["calls"].items()},
        "ledger_seconds_per_step": inside["ledger"] / steps,
        "step_seconds": inside["seconds"] / steps,
        "loop_share": inside["ledger"] / inside["seconds"],
        "thread_share": inside["thread"] / inside["seconds"],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))
