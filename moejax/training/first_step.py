"""A run directory at step 0, of parameters from elsewhere: ``moejax train`` goes on with it."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import ConfigError
from moejax.output_folder import whole_folder
from moejax.training import run_dir
from moejax.training.checkpoints import Checkpointer
from moejax.training.prepare import Setup
from moejax.training.run_config import RunConfig
from moejax.training.state import TrainState, make_init

CONFIG_FILE = "config.py"

# The run's config as a file for ``moejax train --config``.
CONFIG_TEXT = '''"""The config of the run in this folder, as `moejax {command}` wrote it."""

import json
import pathlib

import ml_collections


def get_config():
    record = json.loads((pathlib.Path(__file__).parent / "config.json").read_text())
    return ml_collections.ConfigDict(record["config"])
'''


def merge(base: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    """The user's fields over those of the base, block by block."""
    merged = dict(base)
    for name, value in user.items():
        block = isinstance(value, Mapping) and isinstance(base.get(name), dict)
        merged[name] = merge(base[name], value) if block else value
    return merged


def with_tokenizer(config: RunConfig, path: str) -> RunConfig:
    """The config with another ``data.tokenizer``."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def first_state(variables: dict[str, Any], setup: Setup) -> TrainState:
    """The state of step 0 on the run's mesh: these parameters and a fresh optimizer."""
    _, abstract = make_init(setup.config.model, setup.optimizer, setup.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    with jax.set_mesh(setup.mesh):
        params = jax.device_put(variables["params"], shardings.params)
        start = jax.jit(setup.optimizer.init, out_shardings=shardings.opt_state)
        state = TrainState(
            jnp.zeros((), jnp.int32), params, start(params), variables.get("router_state", {})
        )
    return jax.device_put(state, shardings)


@contextlib.contextmanager
def new_run(
    target: pathlib.Path,
    shown: str,
    command: str,
    config: RunConfig,
    setup: Setup,
    state: TrainState,
    origin: Mapping[str, Any],
) -> Iterator[pathlib.Path]:
    """Writes a run at step 0, as a whole or not at all; the body may add to its folder.

    Args:
      target: from ``check_new_folder``.
      shown: the flag and its value, for messages.
      command: that makes it.
      config: the run, as it will be trained.
      setup: of that run.
      state: of step 0.
      origin: where the parameters are from; ``config.json`` keeps it under ``from``.

    Raises:
      UserError: the folder cannot be written, or the run would learn from another one's model;
        nothing is left behind.
    """
    if config.looks_at is not None:
        raise ConfigError(
            config.looks_at, "...", "names a model to learn from, which a run that begins with "
            "given weights does not; train it first, and start from that run",
        )  # fmt: skip
    with whole_folder(target, shown) as folder:
        record = {**run_dir.describe(config, setup.dataset), "from": dict(origin)}
        directory = run_dir.RunDirectory(folder, record, resumed=False)
        with directory.create(setup.dataset):
            text = CONFIG_TEXT.format(command=command)
            (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
            yield folder
            # What the loop restores beside the state.
            extra = {"data_position": 0, "loss": math.nan, "val_loss": None, "val_step": None,
                     "tokens": 0}  # fmt: skip
            with Checkpointer(folder / run_dir.CHECKPOINTS, config.checkpoint) as checkpoints:
                checkpoints.save(0, state, extra, wait=True)
