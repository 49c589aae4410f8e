"""One compiled training step for runs that differ in seed, learning rate and length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import write_config

from moejax.models import ModelConfig
from moejax.parallel import MeshConfig, make_mesh
from moejax.training import programs, restore, run_config
from moejax.training.optimizers import OptimConfig, learning_rate, optimizer_under
from moejax.training.prepare import prepare
from moejax.training.run_config import TrainConfig
from moejax.training.schedules import Hyper
from moejax.training.state import TrainState
from moejax.training.step import make_shared_step, make_train_step
from moejax.training.train import train


def optax_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate put together of optax's schedules, whose numbers become constants."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    rise = optax.linear_schedule(0.0, peak, warmup)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(1, steps - warmup), config.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    start = max(warmup, steps - round(config.decay_fraction * steps))
    fall = optax.linear_schedule(peak, peak * config.final_fraction, max(1, steps - start))
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, start])


STEPS = jnp.arange(130)
FRACTIONS = st.sampled_from([0.0, 0.1, 0.3, 0.4, 1.0]) | st.floats(0.0, 1.0, width=32)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    peak=st.floats(1e-5, 1.0),
    warmup=st.integers(0, 150),
    decay=FRACTIONS,
    final=FRACTIONS,
    steps=st.integers(1, 120),
)
def test_schedules_are_optaxs_at_every_step(schedule, peak, warmup, decay, final, steps):
    config = OptimConfig(
        schedule=schedule, learning_rate=peak, warmup_steps=warmup, decay_fraction=decay,
        final_fraction=final,
    )  # fmt: skip
    wanted = np.broadcast_to(optax_schedule(config, steps)(STEPS), STEPS.shape)
    np.testing.assert_allclose(learning_rate(config, steps)(STEPS), wanted, rtol=1e-7, atol=1e-30)


def test_a_schedule_as_an_argument_is_the_same_to_rounding():
    at = jax.jit(lambda rate, step: rate(step))
    for schedule in ("cosine", "wsd"):
        for peak, steps in ((1.0, 20), (0.5, 100)):
            config = OptimConfig(learning_rate=peak, warmup_steps=7, schedule=schedule)
            rate = learning_rate(config, steps)
            np.testing.assert_allclose(at(rate, STEPS), rate(STEPS), rtol=0, atol=2e-7 * peak)
    assert at._cache_size() == 2, "a program a shape, whatever its numbers"


# Noise, so that the seed matters.
NOISY = tiny.moe_config("top_k", options={"jitter": 0.5}, num_layers=1, first_k_dense=0)
SEED = 2**31 + 5


def losses(step, model: ModelConfig, optim: OptimConfig) -> list[list[float]]:
    """Losses, norms of gradients and learning rates of five steps on one batch."""
    params = tiny.variables(model)["params"]
    optimizer = optimizer_under(optim, optax.constant_schedule(0.0))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {})
    run, found = jax.jit(step), []
    for _ in range(5):
        state, metrics = run(state, tiny.batch())
        values = (metrics.loss, metrics.aux_loss, metrics.gradient_norm, metrics.learning_rate)
        found.append([float(value) for value in values])
    return found


@pytest.mark.parametrize(
    "optimizer, schedule, mtp_depth",
    [("adamw", "cosine", 0), pytest.param("muon", "wsd", 1, marks=pytest.mark.slow)],
)
def test_the_step_does_what_it_did_with_constants(optimizer, schedule, mtp_depth):
    model = dataclasses.replace(NOISY, mtp_depth=mtp_depth)
    optim = OptimConfig(optimizer, schedule=schedule, warmup_steps=2, decay_fraction=0.4)
    constant = optax_schedule(optim, 5)
    weight = lambda step: jnp.where(step < 2, 0.3, 0.1)
    wanted = make_train_step(model, optimizer_under(optim, constant), constant, SEED, weight)
    weights = TrainConfig(steps=5, mtp_switch=0.4).mtp_schedule
    told = Hyper(np.uint32(SEED), learning_rate(optim, 5), weights)
    # Another learning rate in the optimizer's config: the argument is what counts.
    shared = make_shared_step(model, dataclasses.replace(optim, learning_rate=9.0))
    with jax.set_mesh(make_mesh(MeshConfig())):
        got = losses(lambda state, batch: shared(state, batch, told), model, optim)
        np.testing.assert_allclose(got, losses(wanted, model, optim), rtol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def config_file(folder):
    return str(write_config(folder))


SMALL = ("model.mtp_depth=1", "model.num_layers=1", "model.first_k_dense=0")
OTHER_RUN = (
    "seed=7", "optim.learning_rate=0.003", "optim.warmup_steps=0", "optim.final_fraction=0.0",
    "optim.decay_fraction=0.5", "train.steps=9", "train.mtp_weight=0.7", "train.mtp_switch=0.1",
)  # fmt: skip


# Muon has an AdamW in it.
@pytest.mark.parametrize(
    "optimizer, schedule",
    [("muon", "cosine"), pytest.param("adamw", "wsd", marks=pytest.mark.slow)],
)
def test_runs_lower_to_the_same_text(config_file, optimizer, schedule):
    """What the persistent compilation cache goes by, in another process as well."""
    kind = (*SMALL, f"optim.optimizer={optimizer}", f"optim.schedule={schedule}")

    def texts(*edits):
        setup = prepare(run_config.load(config_file, [*kind, *edits]))
        with jax.set_mesh(setup.mesh):
            lowered = programs.lower(setup)
        return [part.as_text() for part in (lowered.init, lowered.train_step, lowered.eval_step)]

    assert texts() == texts(*OTHER_RUN)


# Fields that a run's programs do not depend on; all others are part of the key.
FREE = {
    "optim": {"learning_rate", "warmup_steps", "decay_fraction", "final_fraction"},
    "train": {
        "steps", "log_every", "eval_every", "eval_batches", "mtp_weight", "mtp_weight_final",
        "mtp_switch", "sample_prompt", "sample_tokens",
    },
}  # fmt: skip
OTHERS = {
    "optimizer": "muon", "schedule": "wsd", "moments_dtype": "bfloat16", "sample_prompt": "a",
    "decay_fraction": 0.5, "beta1": 0.5, "beta2": 0.5, "momentum": 0.5, "final_fraction": 0.5,
    "mtp_switch": 0.5, "batch_size": 16,
}  # fmt: skip


def test_the_key_has_every_field_that_a_program_depends_on(config_file):
    setup = prepare(run_config.load(config_file, ["train.batch_size=8"]))
    key = lambda **changes: programs.program_key(
        dataclasses.replace(setup, config=dataclasses.replace(setup.config, **changes))
    )
    assert key() == key(seed=3) and hash(key()) == hash(key(seed=3))
    for block, free in FREE.items():
        options = getattr(setup.config, block)
        for field in dataclasses.fields(options):
            value = OTHERS.get(field.name, 4)
            assert value != getattr(options, field.name), field.name
            changed = dataclasses.replace(options, **{field.name: value})
            assert (key(**{block: changed}) == key()) == (field.name in free), field.name
    model = setup.config.model
    router = dataclasses.replace(model.moe.router, bias_step=0.5)
    moe = dataclasses.replace(model.moe, router=router)
    assert key(model=dataclasses.replace(model, moe=moe)) != key()
    two = dataclasses.replace(setup, mesh=make_mesh(MeshConfig(expert=2)))
    assert programs.program_key(two) != key()


def test_a_second_run_compiles_nothing_and_trains_as_it_would_alone(
    config_file, folder, monkeypatch
):
    calls = []
    compile_programs = programs.compile_programs
    monkeypatch.setattr(
        programs, "compile_programs", lambda setup: calls.append(setup) or compile_programs(setup)
    )
    cache = programs.ProgramCache()
    other = run_config.load(config_file, ["seed=7", "optim.learning_rate=0.003", "train.steps=4"])
    first = train(run_config.load(config_file, []), str(folder / "first"), programs=cache)
    second = train(other, str(folder / "second"), programs=cache)
    assert len(calls) == 1
    assert second["compile_seconds"] < 0.1 * first["compile_seconds"]
    alone = train(other, str(folder / "alone"))
    assert second["loss"] == alone["loss"] != first["loss"]
    got, wanted = (restore.load(folder / name)[1] for name in ("second", "alone"))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
