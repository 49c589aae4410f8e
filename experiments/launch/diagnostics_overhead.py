"""How much of a training step the router diagnostics take, with and without them in turns.

    python experiments/launch/diagnostics_overhead.py --config=FILE [--rounds=N]
        [--config.FIELD=VALUE ...]

One state is trained by two programs in turns, ``train.log_every`` steps each. One is the training
loop's own: it returns the routers' sums and state, which are fetched, turned into what is logged
and written at the end of its steps. The other returns neither, so XLA leaves out what only they
need, and nothing is logged of routers. Both write the rest. The order within a round alternates.
Validation is timed in the same way, batch by batch.

Prints one JSON object: rounds and steps of each, median seconds of a step and of a validation
batch ``with`` and ``without``, and the overhead: the median over rounds of the difference over the
time without, with a bootstrap interval of 95 % over rounds; and the milliseconds on the host of
one logged step's diagnostics. First rounds of each program are not counted.
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


def log(writer: MetricWriter, number: int, metrics: Any) -> float:
    """What the loop does of a logged step; returns the seconds that routers took of it."""
    fetched = jax.device_get(metrics)
    begun = time.perf_counter()
    health = router_health(fetched.router_stats, fetched.router_state)
    values = {f"router/{name}": value for name, value in health.items()}
    writer.write(number, {"loss": float(fetched.loss), **values})
    return time.perf_counter() - begun


def measure(setup: prepare.Setup, rounds: int, folder: str) -> dict[str, Any]:
    """Times both programs; see the module's docstring."""
    train = setup.config.train
    init, _ = make_init(setup.config.model, setup.optimizer, setup.mesh)
    trains, evaluates = programs(setup)
    batches = batches_of(setup, train.micro_batches, 8)
    state, host, number = init(jax.random.key(0)), [], 0
    steps, validation = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    with MetricWriter(folder) as writer:
        for turn in range(rounds + 1):
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                begun = time.perf_counter()
                for _ in range(train.log_every):
                    state, metrics = trains[kind](state, batches[number % len(batches)])
                    number += 1
                    jax.device_get(metrics.loss)  # the loop reads it at every step
                seconds = log(writer, number, metrics)
                steps[kind].append((time.perf_counter() - begun) / train.log_every)
                if kind == "with":
                    host.append(seconds)
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                part = jax.tree.map(lambda leaf: leaf[:1], batches[turn % len(batches)])
                begun = time.perf_counter()
                seen = jax.device_get(evaluates[kind](state, part))
                loads = [stack_layers(seen.router_stats)["load"]] if kind == "with" else []
                held_out_health(seen.router_stats, loads)
                validation[kind].append(time.perf_counter() - begun)
    return {
        "rounds": rounds,
        "steps": {"each": rounds * train.log_every, "log_every": train.log_every},
        "step": compare({kind: values[1:] for kind, values in steps.items()}),
        "validation_batch": compare({kind: values[1:] for kind, values in validation.items()}),
        "host_ms_per_logged_step": 1e3 * float(np.median(host[1:])),
    }


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of both and the overhead, paired by round."""
    own, bare = np.array(seconds["with"]), np.array(seconds["without"])
    overhead = own / bare - 1
    drawn = np.random.default_rng(0).integers(0, len(overhead), (10_000, len(overhead)))
    low, high = np.quantile(np.median(overhead[drawn], axis=1), [0.025, 0.975])
    return {
        "with_seconds": float(np.median(own)),
        "without_seconds": float(np.median(bare)),
        "overhead": float(np.median(overhead)),
        "interval": [float(low), float(high)],
    }


def main(arguments: list[str]) -> dict[str, Any]:
    """Measures as the flags say; returns what is printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args([a for a in arguments if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    setup = prepare.prepare(run_config.load(options.config, overrides))
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(setup.mesh):
        return measure(setup, options.rounds, folder)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:]), indent=1))
