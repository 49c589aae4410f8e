"""A config's training step compiled for devices that are not there: ``moejax plan --lower``.

No weight is allocated, and no accelerator is needed: what comes out is whether the program
partitions over the config's mesh, what a device would hold of it, and what it sends. The number of
devices is fixed where jax starts, so that the compilation has a process of its own:

    python -m moejax.training.lowering --devices=64 --config=FILE [--config.FIELD=VALUE ...]
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from moejax.config import UserError, check
from moejax.training import run_config

_DEVICE_COUNT = "--xla_force_host_platform_device_count"


class LoweringFailed(Exception):
    """The process that compiles ended without a result."""


def lowered(path: str, overrides: Sequence[str], devices: int | None) -> dict[str, Any]:
    """Compiles a config's step in a child process.

    Args:
      path: the config file.
      overrides: FIELD=VALUE settings.
      devices: host devices to force; None for as many as the mesh names.

    Returns:
      As ``compile_step``.

    Raises:
      UserError: the mesh does not fit the devices, or what else the child finds wrong.
      LoweringFailed: the child ended without a result.
    """
    check(devices is None or devices > 0, "--devices", devices, "must be above zero for --lower")
    config = run_config.load(path, list(overrides))
    mesh = dataclasses.replace(config.mesh, data=config.mesh.data or 1)
    count = devices or math.prod(dataclasses.astuple(mesh))
    config.mesh.shape(count)
    command = [sys.executable, "-m", "moejax.training.lowering", f"--devices={count}"]
    command += [f"--config={path}", *(f"--config.{setting}" for setting in overrides)]
    # The child imports what this process does, wherever that is.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        if done.returncode == 2:
            raise UserError(lines[-1])
        raise LoweringFailed(f"the compilation for {count} devices failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def force_devices(devices: int) -> None:
    """Makes the CPU so many devices; before jax starts, since it reads this once.

    Machine code is written without optimization, for it will not run: what is asked for here is
    decided before.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith(_DEVICE_COUNT)]
    flags += [f"{_DEVICE_COUNT}={devices}", "--xla_backend_optimization_level=0"]
    os.environ |= {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def compile_step(config: run_config.RunConfig) -> dict[str, Any]:
    """Lowers and compiles one optimizer step for the devices that jax has.

    Returns:
      ``devices``, ``mesh`` and ``exchange``; bytes of the state on one device as the compiled
      program takes it (``state_bytes_per_device``), by its shardings (``sharded_...``) and as a
      plan counts it (``counted_...``); the program's temporaries on one device (``temp_bytes_...``,
      of XLA's CPU backend) and what a plan expects of them (``planned_temp_bytes_...``);
      ``output_bytes_per_device``; ``collectives`` (``moejax.parallel.collectives.summed``) and
      ``warnings``; ``params``; ``seconds`` by what they went to, and ``total``;
      ``peak_process_bytes``; ``jax``.
    """
    import jax
    import numpy as np

    from moejax.cost import counts
    from moejax.cost.memory import memory_parts
    from moejax.parallel import make_mesh
    from moejax.parallel.collectives import summed
    from moejax.parallel.mesh import check_fits
    from moejax.training.optimizers import learning_rate, make_optimizer
    from moejax.training.prepare import choose_back_ends, layout_of, placement_of, second_model
    from moejax.training.programs import batch_rows, lower_step
    from moejax.training.schedules import Hyper
    from moejax.training.sent import sends
    from moejax.training.state import make_init

    started = time.monotonic()
    config, train = _in_a_chips_type(config), config.train
    mesh = make_mesh(config.mesh)
    part = train.batch_size // train.micro_batches
    check_fits(tuple(mesh.shape.values()), config.model, part, train.seq_len)
    seconds = {}
    with jax.set_mesh(mesh):
        choice = choose_back_ends(config.model, mesh)
        _, state = make_init(config.model, make_optimizer(config.optim, train.steps), mesh)
        rate = learning_rate(config.optim, train.steps)
        hyper = Hyper(np.uint32(config.seed), rate, train.mtp_schedule)
        step = lower_step(config, state, mesh, hyper, second_model(config))
        seconds["lower"] = time.monotonic() - started
        compiled = step.compile()
    seconds["compile"] = time.monotonic() - started - seconds["lower"]
    memory = compiled.memory_analysis()
    rows = batch_rows(config, mesh)
    found, warnings = sends(compiled.as_text(), config.model, mesh, state, rows)
    local = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    # All of them, though a program drops the few bytes of those that it does not use.
    other_bytes = 4 * local(rows) + sum(leaf.nbytes for leaf in jax.tree.leaves(hyper))
    placement = placement_of(config, layout_of(config.mesh, mesh.size))
    counted = memory_parts(config.model, hardware="cpu", seq_len=train.seq_len, placement=placement)
    params = counts.count(config.model, train.seq_len).params
    seconds["total"] = time.monotonic() - started
    return {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "exchange": None if choice is None else choice.exchange,
        "params": params.total + params.mtp,
        "state_bytes_per_device": memory.argument_size_in_bytes - other_bytes,
        "sharded_bytes_per_device": sum(local(leaf) for leaf in jax.tree.leaves(state)),
        "counted_bytes_per_device": counted["weights"] + counted["optimizer"],
        "temp_bytes_per_device": memory.temp_size_in_bytes,
        "planned_temp_bytes_per_device": sum(
            counted[name] for name in ("gradients", "activations", "working")
        ),
        "output_bytes_per_device": memory.output_size_in_bytes,
        "collectives": summed(found),
        "warnings": warnings,
        "seconds": seconds,
        "peak_process_bytes": peak_memory(),
        "jax": jax.__version__,
    }


def _in_a_chips_type(config: run_config.RunConfig) -> run_config.RunConfig:
    """``model.dtype`` auto as the config's accelerator has it, though a CPU compiles."""
    if config.model.dtype != "auto" or config.cost.hardware in ("auto", "cpu"):
        return config
    model = dataclasses.replace(config.model, dtype="bfloat16")
    return dataclasses.replace(config, model=model)


def peak_memory() -> int | None:
    """The most bytes of memory that this process had at once; None where Linux does not say.

    Not getrusage's: that is the peak of the process that started this one, if that was larger.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def main(arguments: Sequence[str]) -> int:
    """The child's part: prints one JSON object; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--devices", type=int, required=True, help="host devices to force")
    parser.add_argument("--config", required=True, metavar="FILE")
    settings = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    options = parser.parse_args([a for a in arguments if not a.startswith("--config.")])
    force_devices(options.devices)
    try:
        print(json.dumps(compile_step(run_config.load(options.config, settings))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
