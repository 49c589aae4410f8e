"""A run that starts from another run's weights (block ``start``): what fits, and their way in.

Parameters and the routers' state are the other run's; the optimizer, the steps and the order of the
data begin anew. ``config.json`` keeps which run and which checkpoint it was under ``start``, so
that a run that was stopped before its first checkpoint starts from the same one again.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from moejax.config import ConfigError, UserError, check
from moejax.data import tokenizers
from moejax.training import manifest, run_dir
from moejax.training.beginning import Beginning
from moejax.training.checkpoints import Checkpointer, CheckpointError
from moejax.training.optimizers import make_optimizer
from moejax.training.prepare import Setup
from moejax.training.run_config import RunConfig, flat
from moejax.training.run_dir import RunDirectory
from moejax.training.state import make_init

# Fields of the model that may differ: how it is computed and balanced, not what it computes.
MAY_DIFFER = {
    "model.loss_chunk", "model.remat", "model.unroll", "model.dtype", "model.precision",
    "model.attention.implementation", "moe.dispatch", "moe.capacity_factor", "moe.drop_policy",
    "moe.allow_leak", "moe.exchange", "moe.exchange_factor", "moe.exchange_overflow",
    "moe.devices_per_node", "router.bias_step", "router.bias_momentum", "router.bias_stop_step",
    "router.layer_weights", "router.coupling_alpha",
}  # fmt: skip


def recorded_in(directory: RunDirectory, setup: Setup) -> RunDirectory:
    """A new run's directory with what it starts from in its record; others as they are.

    Raises:
      ConfigError: ``start.run`` is no run, has no such checkpoint or a damaged one, or is of
        another model or tokenizer.
    """
    if directory.resumed or not setup.config.start.run:
        return directory
    record = {**directory.record, "start": find(setup)}
    record["fingerprint"] = run_dir.fingerprint(record)
    return dataclasses.replace(directory, record=record)


def find(setup: Setup) -> dict[str, Any]:
    """The checkpoint that a run starts from, checked.

    Returns:
      ``run`` (its folder), ``step``, ``val_loss`` (of that step; None where it was not validated)
      and ``fingerprint`` (of the other run), JSON-ready.

    Raises:
      ConfigError: see ``recorded_in``.
    """
    config, shown = setup.config, setup.config.start.run
    folder = pathlib.Path(shown).expanduser().absolute()
    is_run = (folder / run_dir.CONFIG).is_file()
    check(is_run, "start.run", shown, f"no run is there (no {run_dir.CONFIG}); give a run's folder")
    try:
        record = run_dir.read_record(folder)
        other = run_dir.recorded(record)
        saved = tokenizers.load_saved(folder / run_dir.TOKENIZER)
    except UserError as error:
        raise ConfigError("start.run", shown, f"cannot be read: {error}") from error
    _check_model(config, other, shown)
    own = folder / run_dir.TOKENIZER / tokenizers.FILE
    check(
        saved.fingerprint == setup.dataset.tokenizer.fingerprint,
        "data.tokenizer", config.data.tokenizer,
        "is not the one that the run in start.run was trained with; use "
        + (repr(str(own)) if own.is_file() else "'bytes'"),
    )  # fmt: skip
    step, val_loss = _choose(folder / run_dir.CHECKPOINTS, config.start.step, shown)
    return {
        "run": str(folder), "step": step, "val_loss": val_loss,
        "fingerprint": record["fingerprint"],
    }  # fmt: skip


def _check_model(config: RunConfig, other: RunConfig, shown: str) -> None:
    """Raises ConfigError for the first field of the model that differs and may not."""
    ours, theirs = _model_fields(config), _model_fields(other)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                name, ours.get(name),
                f"is {theirs.get(name)!r} in the run that start.run = {shown!r} names; its "
                "weights fit the same model only, so use that value",
            )  # fmt: skip


def _model_fields(config: RunConfig) -> dict[str, Any]:
    blocks = config.to_dict()
    fields = flat({name: blocks[name] for name in ("model", "moe", "router") if name in blocks})
    weight = lambda name: name.startswith("router.") and name.endswith("_loss_weight")
    return {n: value for n, value in fields.items() if n not in MAY_DIFFER and not weight(n)}


def _choose(checkpoints: pathlib.Path, wanted: int, shown: str) -> tuple[int, float | None]:
    """The step to start from, verified, and its validation loss."""
    steps = manifest.sealed(checkpoints)
    check(bool(steps), "start.run", shown, "the run has no checkpoint yet; train it on")
    check(
        not wanted or wanted in steps, "start.step", wanted,
        f"is no checkpoint of {shown!r}; there are those of steps {', '.join(map(str, steps))}",
    )  # fmt: skip
    try:
        losses = {s: manifest.read(checkpoints / str(s), s)["val_loss"] for s in steps}
        judged = {step: loss for step, loss in losses.items() if loss is not None}
        best = min(judged, key=lambda step: (judged[step], -step), default=max(steps))
        step = wanted or best
        manifest.verify(checkpoints / str(step), step)
    except CheckpointError as error:
        remedy = f"{error}; name another one by start.step, or restore the file"
        raise ConfigError("start.run", shown, remedy) from error
    return step, losses[step]


def from_run(
    begun: Beginning, setup: Setup, record: dict[str, Any], say: Callable[[str], None]
) -> Beginning:
    """A state of step 0 with the weights that the run's record names; as it is where it names none.

    Args:
      begun: of the seed, in place on the run's mesh.
      setup: the run.
      record: its ``config.json``.
      say: takes a line for the user.

    Raises:
      UserError: the other run is gone, or is another one by now.
    """
    origin = record.get("start")
    if origin is None:
        return begun
    folder, step = pathlib.Path(origin["run"]), origin["step"]
    before = run_dir.read_record(folder)
    if before["fingerprint"] != origin["fingerprint"]:
        raise UserError(
            f"start.run = {origin['run']!r}: holds another run than the one that this run began "
            "from; put that one back, or use a new --workdir"
        )
    other = run_dir.recorded(before)
    # The other run's optimizer decides the form of its state, the run's own model that of the rest.
    _, abstract = make_init(
        setup.config.model, make_optimizer(other.optim, other.train.steps), setup.mesh
    )
    with Checkpointer(folder / run_dir.CHECKPOINTS, other.checkpoint) as checkpoints:
        restored = checkpoints.restore(abstract, step).state
    loss = origin["val_loss"]
    told = "" if loss is None else f" (validation {loss:.4f} nats/token)"
    say(f"start       weights of step {step} of {folder}{told}; a fresh optimizer")
    state = begun.state.replace(params=restored.params, router_state=restored.router_state)
    del restored
    return begun._replace(state=jax.block_until_ready(state))
