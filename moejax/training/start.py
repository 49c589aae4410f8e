"""A run that needs another run's weights: to start from (block ``start``), or as a teacher.

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
from moejax.models import ModelConfig
from moejax.training import manifest, run_dir
from moejax.training.beginning import Beginning
from moejax.training.checkpoints import Checkpointer, CheckpointError
from moejax.training.optimizers import make_optimizer
from moejax.training.prepare import Setup
from moejax.training.run_config import RunConfig, flat
from moejax.training.run_dir import RunDirectory
from moejax.training.state import TrainState, make_init

# Fields of the model that may differ: how it is computed and balanced, not what it computes.
MAY_DIFFER = {
    "model.loss_chunk", "model.remat", "model.unroll", "model.dtype", "model.precision",
    "model.attention.implementation", "moe.dispatch", "moe.capacity_factor", "moe.drop_policy",
    "moe.allow_leak", "moe.exchange", "moe.exchange_factor", "moe.exchange_overflow",
    "moe.devices_per_node", "router.bias_step", "router.bias_momentum", "router.bias_stop_step",
    "router.layer_weights", "router.coupling_alpha",
}  # fmt: skip


def recorded_in(directory: RunDirectory, setup: Setup) -> RunDirectory:
    """A new run's directory with what it starts from, and its teacher, in its record; others as
    they are.

    Raises:
      ConfigError: ``start.run`` or ``distill.run`` is no run, has no such checkpoint or a damaged
        one, or is of another model or tokenizer.
    """
    config, found = setup.config, {}
    if directory.resumed:
        block = getattr(config, "looks_at", None)
        if block is not None and directory.finished() is None:
            origin_of(block, directory.record)
        return directory
    if config.start.run:
        found["start"] = find(setup)
    if getattr(config, "distill", None) is not None:
        found["distill"] = find(setup, "distill")
    if not found:
        return directory
    record = {**directory.record, **found}
    record["fingerprint"] = run_dir.fingerprint(record)
    return dataclasses.replace(directory, record=record)


def find(setup: Setup, block: str = "start") -> dict[str, Any]:
    """The checkpoint that a run starts from or learns from, checked.

    Args:
      setup: the run.
      block: ``start``, whose model has to be the run's own, or ``distill``, whose model may be of
        another size.

    Returns:
      ``run`` (its folder), ``step``, ``val_loss`` (of that step; None where it was not validated)
      and ``fingerprint`` (of the other run), JSON-ready.

    Raises:
      ConfigError: see ``recorded_in``.
    """
    config, options = setup.config, getattr(setup.config, block)
    folder, record, other = read_other(block, options.run)
    try:
        saved = tokenizers.load_saved(folder / run_dir.TOKENIZER)
    except UserError as error:
        raise ConfigError(f"{block}.run", options.run, f"cannot be read: {error}") from error
    if block == "start":
        _check_model(config, other, options.run)
    check(
        other.model.vocab_size == config.model.vocab_size, "model.vocab_size",
        config.model.vocab_size, f"is {other.model.vocab_size} in the run that {block}.run = "
        f"{options.run!r} names; use that value",
    )  # fmt: skip
    own = folder / run_dir.TOKENIZER / tokenizers.FILE
    check(
        saved.fingerprint == setup.dataset.tokenizer.fingerprint,
        "data.tokenizer", config.data.tokenizer,
        f"is not the one that the run in {block}.run was trained with; use "
        + (repr(str(own)) if own.is_file() else "'bytes'"),
    )  # fmt: skip
    step, val_loss = _choose(folder / run_dir.CHECKPOINTS, block, options.step, options.run)
    return {
        "run": str(folder), "step": step, "val_loss": val_loss,
        "fingerprint": record["fingerprint"],
    }  # fmt: skip


def read_other(block: str, shown: str) -> tuple[pathlib.Path, dict[str, Any], RunConfig]:
    """Folder, record and config of the run that a block names.

    Raises:
      ConfigError: no run is there, or it cannot be read.
    """
    folder = pathlib.Path(shown).expanduser().absolute()
    is_run, field = (folder / run_dir.CONFIG).is_file(), f"{block}.run"
    check(is_run, field, shown, f"no run is there (no {run_dir.CONFIG}); give a run's folder")
    try:
        record = run_dir.read_record(folder)
        return folder, record, run_dir.recorded(record)
    except UserError as error:
        raise ConfigError(field, shown, f"cannot be read: {error}") from error


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


def _choose(
    checkpoints: pathlib.Path, block: str, wanted: int, shown: str
) -> tuple[int, float | None]:
    """The step to take, verified, and its validation loss."""
    steps = manifest.sealed(checkpoints)
    check(bool(steps), f"{block}.run", shown, "the run has no checkpoint yet; train it on")
    check(
        not wanted or wanted in steps, f"{block}.step", wanted,
        f"is no checkpoint of {shown!r}; there are those of steps {', '.join(map(str, steps))}",
    )  # fmt: skip
    try:
        losses = {s: manifest.read(checkpoints / str(s), s)["val_loss"] for s in steps}
        judged = {step: loss for step, loss in losses.items() if loss is not None}
        best = min(judged, key=lambda step: (judged[step], -step), default=max(steps))
        step = wanted or best
        manifest.verify(checkpoints / str(step), step)
    except CheckpointError as error:
        remedy = f"{error}; name another one by {block}.step, or restore the file"
        raise ConfigError(f"{block}.run", shown, remedy) from error
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
    restored = weights_of("start", record, setup.mesh, setup.config.model)
    loss = origin["val_loss"]
    told = "" if loss is None else f" (validation {loss:.4f} nats/token)"
    say(f"start       weights of step {origin['step']} of {origin['run']}{told}; a fresh optimizer")
    state = begun.state.replace(params=restored.params, router_state=restored.router_state)
    del restored
    return begun._replace(state=jax.block_until_ready(state))


def second_variables(
    setup: Setup, record: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Variables of the model that the run's objective looks at, on its mesh; None without one.

    Args:
      setup: the run.
      record: its ``config.json``.
      say: takes a line for the user.

    Raises:
      UserError: the other run is gone, or is another one by now.
    """
    block = setup.config.looks_at
    if block is None:
        return None
    origin, found = record[block], weights_of(block, record, setup.mesh)
    what = "teacher     " if block == "distill" else "reference   "
    say(f"{what}step {origin['step']} of {origin['run']}")
    # A teacher's MTP modules do not run.
    own = lambda tree: {name: v for name, v in tree.items() if not name.startswith("mtp_")}
    return {"params": own(found.params), "router_state": own(found.router_state)}


def weights_of(
    block: str, record: dict[str, Any], mesh: jax.sharding.Mesh, model: ModelConfig | None = None
) -> TrainState:
    """The state that a run's record names, with the other run's optimizer state.

    Args:
      block: that named it.
      record: the run's ``config.json``.
      mesh: where it lies.
      model: whose form it has; None for the other run's own.

    Raises:
      UserError: the other run is gone, or is another one by now.
    """
    origin, before = origin_of(block, record)
    other = run_dir.recorded(before)
    # The other run's optimizer decides the form of its state, the model that of the rest.
    optimizer = make_optimizer(other.optim, other.train.steps)
    _, abstract = make_init(model or other.model, optimizer, mesh)
    folder = pathlib.Path(origin["run"]) / run_dir.CHECKPOINTS
    with Checkpointer(folder, other.checkpoint) as checkpoints:
        return checkpoints.restore(abstract, origin["step"]).state


def origin_of(block: str, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run's record says of the run that a block names, and that one's own record.

    Raises:
      UserError: the other run is gone, or is another one by now.
    """
    origin = record.get(block)
    if origin is None:
        raise UserError(
            f"{block}.run: the run's record does not say which run it was; begin it anew, in a new "
            "--workdir"
        )
    before = run_dir.read_record(pathlib.Path(origin["run"]))
    if before["fingerprint"] != origin["fingerprint"]:
        raise UserError(
            f"{block}.run = {origin['run']!r}: holds another run than the one that this run began "
            "from; put that one back, or use a new --workdir"
        )
    return origin, before
