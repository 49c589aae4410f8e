"""``moejax import``: a run directory from a Hugging Face checkpoint, at step 0.

The run has the checkpoint's model and everything else of a run: text can be generated from it, it
can be inspected, trained on and exported. What ``moejax export`` needs lies in its folder ``hf``.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax import config as mechanism
from moejax.config import UserError
from moejax.interop.config_map import architecture
from moejax.interop.hf import read_variables
from moejax.interop.source import Source, open_source, write_record
from moejax.output_folder import check_new_folder, whole_folder
from moejax.training import prepare, run_config, run_dir
from moejax.training.checkpoints import Checkpointer
from moejax.training.optimizers import OptimConfig
from moejax.training.run_config import RunConfig, TrainConfig
from moejax.training.state import TrainState, make_init

FOLDER, CONFIG_FILE = "hf", "config.py"
DEFAULT_SEQ_LEN = 1024

# The run's config as a file for ``moejax train --config``.
CONFIG_TEXT = '''"""The config of the run in this folder, as `moejax import` wrote it."""

import json
import pathlib

import ml_collections


def get_config():
    record = json.loads((pathlib.Path(__file__).parent / "config.json").read_text())
    return ml_collections.ConfigDict(record["config"])
'''


def import_checkpoint(
    hf: str, workdir: str, config_file: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Makes a run at step 0 of a checkpoint, as a whole or not at all.

    Parameters become float32 masters, whatever the checkpoint's type. Blocks of ``config_file`` and
    ``overrides`` say how the run will train; the model is the checkpoint's.

    Args:
      hf: the checkpoint's folder.
      workdir: folder for the run, new or empty.
      config_file: a config file without block ``model``, or with one of the same architecture.
      overrides: settings such as ``train.steps=100``.

    Returns:
      ``workdir``, ``model_type``, ``parameters``, ``config_file`` and ``fingerprint``.

    Raises:
      UserError: a checkpoint, config, corpus or folder that cannot be used.
    """
    shown = f"--workdir = {workdir!r}"
    target = check_new_folder(workdir, shown)
    source = open_source(hf)
    for line in source.remarks:
        print(line, file=sys.stderr)
    source.resolved  # noqa: B018 (checks every tensor before the corpus is read)
    config = _run_config(source, target, config_file, overrides)
    kept = config.data.tokenizer
    if kept == str(target / FOLDER / "tokenizer.json"):
        here = str(source.folder / "tokenizer.json")  # the folder is not there yet
        config = _with_tokenizer(config, here)
    setup = prepare.prepare(config)
    state = _state(source, setup)
    config = _with_tokenizer(setup.config, kept)
    with whole_folder(target, shown) as folder:
        record = run_dir.describe(config, setup.dataset)
        directory = run_dir.RunDirectory(folder, record, resumed=False)
        with directory.create(setup.dataset):
            (folder / CONFIG_FILE).write_text(CONFIG_TEXT, encoding="utf-8")
            (folder / FOLDER).mkdir()
            write_record(source, folder / FOLDER)
            # What the loop restores beside the state.
            extra = {"data_position": 0, "loss": math.nan, "val_loss": None, "val_step": None,
                     "tokens": 0}  # fmt: skip
            with Checkpointer(folder / run_dir.CHECKPOINTS, config.checkpoint) as checkpoints:
                checkpoints.save(0, state, extra, wait=True)
    return {
        "workdir": str(target),
        "model_type": source.values["model_type"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "config_file": str(target / CONFIG_FILE),
        "fingerprint": record["fingerprint"],
    }


def format_import(result: Mapping[str, Any]) -> str:
    """What was made, and how to go on."""
    return (
        f"{result['workdir']}: {result['model_type']}, {result['parameters']:,} parameters\n"
        f"to train it: moejax train --config={result['config_file']} --workdir={result['workdir']}"
    )


def _with_tokenizer(config: RunConfig, path: str) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def _run_config(
    source: Source, target: pathlib.Path, config_file: str | None, overrides: Sequence[str]
) -> RunConfig:
    """The checkpoint's model, with the user's blocks laid over defaults for fine-tuning."""
    reach = source.values.get("max_position_embeddings") or DEFAULT_SEQ_LEN
    train = TrainConfig(steps=1000, batch_size=8, seq_len=min(DEFAULT_SEQ_LEN, reach))
    base = RunConfig(source.config, train, optim=OptimConfig(learning_rate=1e-5), stage="finetune")
    user = mechanism.load(config_file, ()) if config_file else {}
    user = mechanism.override(user, overrides)
    values = _merge(base.to_dict(), user)
    if "tokenizer" not in user.get("data", {}):
        if not (source.folder / "tokenizer.json").is_file():
            raise UserError(
                f"{str(source.folder)!r}: holds no tokenizer.json; add one, or name another "
                "tokenizer, such as --config.data.tokenizer=bytes"
            )
        values["data"]["tokenizer"] = str(target / FOLDER / "tokenizer.json")
        if not values["data"]["separator"]:
            values["data"]["separator"] = _separator(source.folder)
    config = run_config.from_dict(values)
    ours, theirs = architecture(config.model), architecture(source.config)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"config: {name} = {ours.get(name)!r}: the checkpoint's is {theirs.get(name)!r}; "
                "leave it out"
            )
    return config


def _merge(base: dict[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    """The user's fields over those of the base, block by block; another router is whole."""
    merged = dict(base)
    for name, value in user.items():
        block = isinstance(value, Mapping) and isinstance(base.get(name), dict)
        merged[name] = _merge(base[name], value) if block else value
    return merged


def _separator(folder: pathlib.Path) -> str:
    """The end-of-text token that tokenizer_config.json names; "" if there is none."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        token = config.get("eos_token")
    except (OSError, ValueError, AttributeError):
        return ""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _state(source: Source, setup: prepare.Setup) -> TrainState:
    """The state of step 0 on the run's mesh: float32 masters and a fresh optimizer."""
    _, abstract = make_init(setup.config.model, setup.optimizer, setup.mesh)
    with jax.set_mesh(setup.mesh):
        variables = read_variables(source, setup.mesh, "float32")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        start = jax.jit(setup.optimizer.init, out_shardings=shardings.opt_state)
        state = TrainState(
            jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
            variables["params"],
            start(variables["params"]),
            variables.get("router_state", {}),
        )
    return jax.device_put(state, shardings)
