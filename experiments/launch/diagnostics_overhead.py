"""How much of a training step the router diagnostics take, with and without them in turns.

    python experiments/launch/diagnostics_overhead.py --config=FILE [--rounds=N]
        [--config.FIELD=VALUE ...]

One state is trained by two programs in turns, step by step, the order swapped each time. One is the
training loop's own: it returns the routers' sums and state. The other returns neither, so XLA
leaves out what only they need. After every ``train.log_every`` steps of each, their metrics are
fetched and written as in the loop, with the routers' and without. Validation is timed in the same
way, batch by batch.

Prints one JSON object: of a step (its share of the logging included) and of a validation batch the
median seconds ``with`` and ``without`` and the overhead, the median over pairs of the difference
over the time without, with a bootstrap interval of 95 % over pairs. ``wall`` is by the clock,
``cpu`` by the processor time of all threads, which on a machine that others use as well is the one
to go by; on an accelerator it says nothing. The first steps, which compile, are not counted.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.data import train_iterator
from moejax.moe.diagnostics import held_out_health, router_health, stack_layers
from moejax.training import prepare, run_config
from moejax.training.metrics import MetricWriter
from moejax.training.state import make_init
from moejax.training.step import Batch, make_eval_step, make_train_step

FIELDS = ("tokens", "targets", "segment_ids", "positions")
KINDS = ("with", "without")


def programs(setup: prepare.Setup) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """The jitted training and evaluation step, with diagnostics and without."""
    config = setup.config
    step = make_train_step(
        config.model, setup.optimizer, setup.schedule, config.seed, config.train.mtp_schedule
    )
    evaluate = make_eval_step(config.model)

    def bare_step(state, batch):
        state, metrics = step(state, batch)
        return state, metrics.replace(router_stats={}, router_state={})

    bare_evaluate = lambda state, batch: evaluate(state, batch).replace(router_stats={})
    trains = {"with": jax.jit(step, donate_argnums=0)}
    trains["without"] = jax.jit(bare_step, donate_argnums=0)
    return trains, {"with": jax.jit(evaluate), "without": jax.jit(bare_evaluate)}


def batches_of(setup: prepare.Setup, parts: int, count: int) -> list[Batch]:
    """Batches of training text on the device, as micro-batches."""
    config = setup.config
    size = config.train.batch_size
    rows = train_iterator(setup.dataset.train, batch_size=size, seed=0, prefetch=0)
    place = lambda values: jax.numpy.asarray(values.reshape(parts, size // parts, -1))
    found = [Batch(*(place(batch[name]) for name in FIELDS)) for batch, _ in zip(
        rows, range(count), strict=False)]  # fmt: skip
    rows.close()
    return found


def log(writer: MetricWriter, number: int, metrics: Any) -> None:
    """What the loop does of a logged step."""
    fetched = jax.device_get(metrics)
    health = router_health(fetched.router_stats, fetched.router_state)
    values = {f"router/{name}": value for name, value in health.items()}
    writer.write(number, {"loss": float(fetched.loss), **values})


def validate(program: Callable, state: Any, batch: Batch) -> None:
    """What the loop does of a validation batch, and of the whole validation at its end."""
    seen = jax.device_get(program(state, batch))
    loads = [stack_layers(seen.router_stats)["load"]] if seen.router_stats else []
    held_out_health(seen.router_stats, loads)


def measure(setup: prepare.Setup, rounds: int, folder: str) -> dict[str, Any]:
    """Times both programs; see the module's docstring."""
    train = setup.config.train
    init, _ = make_init(setup.config.model, setup.optimizer, setup.mesh)
    trains, evaluates = programs(setup)
    batches = batches_of(setup, train.micro_batches, 8)
    parts = [jax.tree.map(lambda leaf: leaf[:1], batch) for batch in batches]
    state, number = init(jax.random.key(0)), 0
    names = ("step", "log", "validation_batch")
    times = {name: {kind: [] for kind in KINDS} for name in names}
    metrics = {}
    with MetricWriter(folder) as writer:
        for turn in range(rounds + 1):
            for pair in range(train.log_every):
                for kind in KINDS if pair % 2 else KINDS[::-1]:
                    begun = clocks()
                    state, metrics[kind] = trains[kind](state, batches[number % len(batches)])
                    jax.device_get(metrics[kind].loss)  # the loop reads it at every step
                    times["step"][kind].append(clocks() - begun)
                    number += 1
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                begun = clocks()
                log(writer, number, metrics[kind])
                times["log"][kind].append(clocks() - begun)
                begun = clocks()
                validate(evaluates[kind], state, parts[turn % len(parts)])
                times["validation_batch"][kind].append(clocks() - begun)
            print(f"round {turn} of {rounds}", file=sys.stderr)
    logs = {kind: np.median(found[1:], axis=0) / train.log_every for kind, found in
            times["log"].items()}  # fmt: skip
    return {
        "log_every": train.log_every,
        "step": compare(times["step"], logs, first=train.log_every),
        "validation_batch": compare(times["validation_batch"], dict.fromkeys(KINDS, 0.0), first=1),
        "log_ms": {kind: (1e3 * train.log_every * logs[kind]).tolist() for kind in KINDS},
    }


def clocks() -> np.ndarray:
    """Seconds on the clock, and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def compare(times: dict[str, list[np.ndarray]], more: dict[str, Any], first: int) -> dict[str, Any]:
    """Medians of both, ``more`` added, and the overhead, from the ``first`` pair on."""
    found: dict[str, Any] = {"pairs": len(times["with"]) - first}
    for clock, name in enumerate(("wall", "cpu")):
        own, bare = (
            np.array(times[kind])[first:, clock] + np.broadcast_to(more[kind], 2)[clock]
            for kind in KINDS
        )
        overhead = own / bare - 1
        drawn = np.random.default_rng(0).integers(0, len(overhead), (10_000, len(overhead)))
        low, high = np.quantile(np.median(overhead[drawn], axis=1), [0.025, 0.975])
        found[name] = {
            "with_seconds": float(np.median(own)),
            "without_seconds": float(np.median(bare)),
            "overhead": float(np.median(overhead)),
            "interval": [float(low), float(high)],
        }
    return found


def main(arguments: list[str]) -> dict[str, Any]:
    """Measures as the flags say; returns what is printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=20, help="of train.log_every pairs")
    options = parser.parse_args([a for a in arguments if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    setup = prepare.prepare(run_config.load(options.config, overrides))
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(setup.mesh):
        return measure(setup, options.rounds, folder)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))
