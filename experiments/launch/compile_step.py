"""Compiles a config's training step for many forced host devices, from shapes alone.

    python experiments/launch/compile_step.py --devices=64 --config=FILE [--config.FIELD=VALUE ...]

No weight is allocated, and no accelerator is needed: what comes out is whether the program
partitions over the config's mesh, and what a device would hold of it. Prints one JSON object:
bytes of the state on one device, as the compiled program takes it (``state_bytes``), by the
shardings (``sharded_bytes``) and counted from the config (``counted_bytes``); the program's
temporaries on one device (``temp_bytes``, of XLA's CPU backend) and what a plan expects of them
(``planned_temp_bytes``); seconds; and this process's peak memory.
"""

import argparse
import json
import math
import os
import sys
import time

from moejax.config import UserError


def main(arguments: list[str]) -> dict:
    """Compiles the step that the flags describe; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=64, help="host devices to force")
    parser.add_argument("--config", required=True, metavar="FILE")
    options = parser.parse_args([a for a in arguments if not a.startswith("--config.")])
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    # Before jax is imported: it reads them once. Machine code is written without optimization, for
    # it will not run; what is asked for here is decided before.
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={options.devices}",
        "--xla_backend_optimization_level=0",
    )
    os.environ |= {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return compile_step(options.config, overrides)


def compile_step(path: str, overrides: list[str]) -> dict:
    """Lowers and compiles one optimizer step; see the module's docstring."""
    import jax
    import numpy as np

    from moejax.cost import counts
    from moejax.cost.memory import memory_parts
    from moejax.parallel import make_mesh, sharding
    from moejax.parallel.mesh import check_fits
    from moejax.training import run_config
    from moejax.training.optimizers import learning_rate, make_optimizer
    from moejax.training.prepare import layout_of, placement_of
    from moejax.training.schedules import Hyper
    from moejax.training.state import make_init
    from moejax.training.step import Batch, make_shared_step

    started = time.monotonic()
    config = run_config.load(path, overrides)
    model, train = config.model, config.train
    mesh = make_mesh(config.mesh)
    shape, part = tuple(mesh.shape.values()), train.batch_size // train.micro_batches
    check_fits(shape, model, part, train.seq_len)
    optimizer = make_optimizer(config.optim, train.steps)
    with jax.set_mesh(mesh):
        _, state = make_init(model, optimizer, mesh)
        rate = learning_rate(config.optim, train.steps)
        hyper = Hyper(np.uint32(config.seed), rate, train.mtp_schedule)
        step = make_shared_step(model, config.optim)
        parts = train.micro_batches
        rows = jax.ShapeDtypeStruct(
            (parts, train.batch_size // parts, train.seq_len), np.int32,
            sharding=sharding(mesh, None, "batch", "length"),
        )  # fmt: skip
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(
            state, Batch(rows, rows, rows, rows), hyper
        )
        seconds = {"lower": time.monotonic() - started}
        memory = lowered.compile().memory_analysis()
    seconds["total"] = time.monotonic() - started
    params = counts.count(model, train.seq_len).params
    local = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    # All of them, though a program drops the few bytes of those that it does not use.
    other_bytes = 4 * local(rows) + sum(leaf.nbytes for leaf in jax.tree.leaves(hyper))
    placement = placement_of(config, layout_of(config.mesh, mesh.size))
    counted = memory_parts(model, hardware="cpu", seq_len=train.seq_len, placement=placement)
    return {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "params": params.total + params.mtp,
        "counted_bytes": counted["weights"] + counted["optimizer"],
        "sharded_bytes": sum(local(leaf) for leaf in jax.tree.leaves(state)),
        "state_bytes": memory.argument_size_in_bytes - other_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "planned_temp_bytes": sum(
            counted[name] for name in ("gradients", "activations", "working")
        ),
        "output_bytes": memory.output_size_in_bytes,
        "seconds": seconds,
        "peak_process_bytes": peak_memory(),
        "jax": jax.__version__,
    }


def peak_memory() -> int | None:
    """The most bytes of memory that this process had at once; None where Linux does not say.

    Not getrusage's: that is the peak of the process that started this one, if that was larger.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1:])))
    except UserError as error:
        print(f"compile_step: {error}", file=sys.stderr)
        sys.exit(2)
