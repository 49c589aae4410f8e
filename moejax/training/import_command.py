"""``moejax import``: a run directory from a Hugging Face checkpoint, at step 0.

The run has the checkpoint's model and everything else of a run: text can be generated from it, it
can be inspected, trained on and exported. What ``moejax export`` needs lies in its folder ``hf``.
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moejax import config as mechanism
from moejax.config import UserError
from moejax.interop.config_map import architecture
from moejax.interop.hf import read_variables
from moejax.interop.source import Source, open_source, write_record
from moejax.output_folder import check_new_folder
from moejax.training import prepare, run_config, run_dir
from moejax.training.first_step import CONFIG_FILE, first_state, merge, new_run, with_tokenizer
from moejax.training.optimizers import OptimConfig
from moejax.training.run_config import RunConfig, TrainConfig
from moejax.training.state import TrainState

FOLDER = "hf"
DEFAULT_SEQ_LEN = 1024


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
        config = with_tokenizer(config, here)
    setup = prepare.prepare(config)
    state = _state(source, setup)
    config = with_tokenizer(setup.config, kept)
    origin = {"hf": str(source.folder), "model_type": source.values["model_type"]}
    with new_run(target, shown, "import", config, setup, state, origin) as folder:
        (folder / FOLDER).mkdir()
        write_record(source, folder / FOLDER)
    return {
        "workdir": str(target),
        "model_type": source.values["model_type"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "config_file": str(target / CONFIG_FILE),
        "fingerprint": run_dir.read_record(target)["fingerprint"],
    }


def format_import(result: Mapping[str, Any]) -> str:
    """What was made, and how to go on."""
    return (
        f"{result['workdir']}: {result['model_type']}, {result['parameters']:,} parameters\n"
        f"to train it: moejax train --config={result['config_file']} --workdir={result['workdir']}"
    )


def _run_config(
    source: Source, target: pathlib.Path, config_file: str | None, overrides: Sequence[str]
) -> RunConfig:
    """The checkpoint's model, with the user's blocks laid over defaults for fine-tuning."""
    reach = source.values.get("max_position_embeddings") or DEFAULT_SEQ_LEN
    train = TrainConfig(steps=1000, batch_size=8, seq_len=min(DEFAULT_SEQ_LEN, reach))
    base = RunConfig(source.config, train, optim=OptimConfig(learning_rate=1e-5), stage="finetune")
    user = mechanism.load(config_file, ()) if config_file else {}
    user = mechanism.override(user, overrides)
    values = merge(base.to_dict(), user)
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
    """The state of step 0: float32 masters of the checkpoint, read straight onto the mesh."""
    with jax.set_mesh(setup.mesh):
        variables = read_variables(source, setup.mesh, "float32")
    return first_state(variables, setup)
