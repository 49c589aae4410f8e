"""A run's compiled programs, and runs of one process that share them."""

import dataclasses
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moejax.models import ModelConfig
from moejax.parallel import sharding
from moejax.training.objective import CrossEntropy, Distillation, Objective, Preferences
from moejax.training.optimizers import OptimConfig, make_optimizer
from moejax.training.prepare import Setup
from moejax.training.run_config import RunConfig
from moejax.training.schedules import Hyper
from moejax.training.sent import sends, sent_lines
from moejax.training.state import TrainState, make_init
from moejax.training.step import Batch, StepMetrics, make_eval_step, make_shared_step

COMPILING = "compile a run's programs"


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run.

    Attributes:
      init: the first state, from a PRNG key.
      train_step: an optimizer step; overwrites its state. A second model's variables come last,
        where the objective looks at one.
      eval_step: see ``make_eval_step``; takes one micro-batch.
      abstract: the state's shapes as ``jax.ShapeDtypeStruct`` with shardings.
      notes: what a step sends between devices, and warnings of axes that waste; none on one device.
    """

    init: Callable[[Array], TrainState]
    train_step: Callable[..., tuple[TrainState, StepMetrics]]
    eval_step: Callable[[TrainState, Batch], tuple[Float[Array, ""], Float[Array, ""]]]
    abstract: TrainState
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A run's programs before they are compiled; the fields are those of ``Programs``."""

    init: jax.stages.Lowered
    train_step: jax.stages.Lowered
    eval_step: jax.stages.Lowered
    abstract: TrainState


def lower(setup: Setup) -> Lowered:
    """Traces and lowers a run's programs, on the current mesh."""
    config, mesh = setup.config, setup.mesh
    init, abstract = make_init(config.model, setup.optimizer, mesh)
    whole = NamedSharding(mesh, PartitionSpec())  # of metrics: every process reads them
    return Lowered(
        init.lower(jax.random.key(config.seed)),
        lower_step(config, abstract, mesh, hyper(setup), setup.frozen),
        # A validation batch is as large as a micro-batch: what trains in memory also validates.
        jax.jit(make_eval_step(config.model), out_shardings=whole).lower(
            abstract, _batch(config, batch_rows(config, mesh, parts=1))
        ),
        abstract,
    )


def lower_step(
    config: RunConfig,
    abstract: TrainState,
    mesh: Mesh,
    told: Hyper,
    frozen: ModelConfig | None = None,
) -> jax.stages.Lowered:
    """Traces and lowers one optimizer step, on the current mesh.

    Args:
      config: the run.
      abstract: the state's shapes with shardings, from ``make_init``.
      mesh: where it will run.
      told: what the step takes beside state and batch.
      frozen: the second model of the run's objective; None without one.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    second = () if frozen is None else (_variables(frozen, config.optim, mesh),)
    step = jax.jit(
        make_shared_step(config.model, config.optim, objective_of(config, frozen)),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), whole),
    )
    return step.lower(abstract, _batch(config, batch_rows(config, mesh)), told, *second)


def objective_of(config: RunConfig, frozen: ModelConfig | None) -> Objective:
    """What the run minimises, by its blocks; ``frozen`` is the second model's config."""
    if config.distill is not None:
        return Distillation(config.distill, config.model, frozen)
    if config.preferences is not None:
        return Preferences(config.preferences, config.model)
    return CrossEntropy(config.model)


def _variables(model: ModelConfig, optim: OptimConfig, mesh: Mesh) -> dict[str, Any]:
    """Shapes and shardings of a second model's variables."""
    _, abstract = make_init(model, make_optimizer(optim, 1), mesh)
    return {"params": abstract.params, "router_state": abstract.router_state}


def batch_rows(config: RunConfig, mesh: Mesh, parts: int = 0) -> jax.ShapeDtypeStruct:
    """Shape and sharding of a batch's token ids; ``parts`` 0 means the config's micro-batches."""
    train = config.train
    rows = train.batch_size // train.micro_batches
    shape = (parts or train.micro_batches, rows, train.seq_len)
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding(mesh, None, "batch", "length"))


def _batch(config: RunConfig, rows: jax.ShapeDtypeStruct) -> Batch:
    weights = None
    if config.data.weighted:
        weights = jax.ShapeDtypeStruct(rows.shape, np.float32, sharding=rows.sharding)
    return Batch(rows, rows, rows, rows, weights)


def compile_programs(setup: Setup) -> Programs:
    """Compiles a run's programs side by side, on the current mesh."""
    lowered = lower(setup)
    parts = (lowered.init, lowered.train_step, lowered.eval_step)
    pool = ThreadPoolExecutor(len(parts), thread_name_prefix=COMPILING)
    try:
        init, train_step, eval_step = pool.map(lambda part: part.compile(), parts)
    finally:
        pool.shutdown(wait=False)  # a signal that stops the run waits for no compiler
    notes = tuple(_notes(setup, train_step, lowered.abstract))
    return Programs(init, train_step, eval_step, lowered.abstract, notes)


def _notes(setup: Setup, step: jax.stages.Compiled, abstract: TrainState) -> list[str]:
    """What the step sends between devices, in lines; nothing on one device."""
    if setup.mesh.size == 1:
        return []
    rows = batch_rows(setup.config, setup.mesh)
    return sent_lines(*sends(step.as_text(), setup.config.model, setup.mesh, abstract, rows))


def compiling() -> bool:
    """Whether programs are still being compiled for a run that was stopped."""
    return any(thread.name.startswith(COMPILING) for thread in threading.enumerate())


def hyper(setup: Setup) -> Hyper:
    """What the run's training step takes beside state and batch, on every device of the mesh."""
    config = setup.config
    told = Hyper(np.uint32(config.seed), setup.schedule, config.train.mtp_schedule)
    return jax.device_put(told, NamedSharding(setup.mesh, PartitionSpec()))


class ProgramCache:
    """Compiled programs of one process, for runs that need the same ones.

    Runs share programs if they differ only in the seed, the text, the learning rate's peak and
    schedule lengths, the number of steps, the weight of MTP modules and what happens outside of a
    step: logging, validation, checkpoints, budgets. A ``trace`` router's file is read once a
    process, with a cache or without.

    Programs are kept until the cache is dropped.
    """

    def __init__(self) -> None:
        self._programs: dict[Hashable, Programs] = {}

    def get(self, setup: Setup) -> Programs:
        """The run's programs, compiled now if no earlier run had the same."""
        key = program_key(setup)
        if key not in self._programs:
            self._programs[key] = compile_programs(setup)
        return self._programs[key]


def program_key(setup: Setup) -> Hashable:
    """Everything that a run's programs depend on, in this process."""
    config, train = setup.config, setup.config.train
    # The decay's shape stays in the program; its numbers are arguments (``Hyper``).
    optim = dataclasses.replace(
        config.optim, learning_rate=1.0, warmup_steps=0, decay_fraction=0.0, final_fraction=0.0
    )
    options = sorted((name, repr(value)) for name, value in jax.config.values.items())
    return (
        config.model, optim, setup.mesh, train.batch_size, train.seq_len, train.micro_batches,
        config.data.weighted, setup.choice, repr(setup.products), tuple(options), setup.frozen,
        config.distill and dataclasses.replace(config.distill, run="", step=0), config.preferences,
    )  # fmt: skip
