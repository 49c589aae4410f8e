"""``moejax upcycle``: a run of an MoE model, at step 0, from a dense run's newest checkpoint."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moejax import config as mechanism
from moejax.config import UserError, check
from moejax.cost import counts, text
from moejax.data import tokenizers
from moejax.interop.config_map import architecture
from moejax.interop.upcycle import UpcycleOptions, upcycle, upcycled_config
from moejax.models import ModelConfig
from moejax.output_folder import check_new_folder
from moejax.training import prepare, restore, run_config, run_dir
from moejax.training.first_step import CONFIG_FILE, first_state, merge, new_run, with_tokenizer
from moejax.training.run_config import RunConfig


def upcycle_run(
    workdir: str,
    out: str,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
    *,
    every: int = 1,
    router_std: float = 0.0,
    noise: float = 0.0,
) -> dict[str, Any]:
    """Makes a run of an MoE model from a dense run, as a whole or not at all.

    Its config is the dense run's, with the user's blocks laid over it: at least ``moe``. Which
    layers become MoE layers say ``model.segments``, or ``model.first_k_dense`` and ``every``. The
    seed of the run draws the routers.

    Args:
      workdir: the dense run's folder.
      out: folder for the new run, new or empty.
      config_file: a config file with the blocks that change.
      overrides: settings such as ``moe.top_k=2``.
      every: of the layers after ``model.first_k_dense``, every n-th becomes an MoE layer.
      router_std: see ``moejax.interop.upcycle.UpcycleOptions``.
      noise: see there.

    Returns:
      ``workdir`` (the new run's), ``from``, ``parameters``, ``active_parameters`` (with the head),
      ``shards``, ``config_file`` and ``fingerprint``.

    Raises:
      UserError: no dense run with a checkpoint, or a config, corpus or folder that cannot be used.
    """
    shown, source = f"--out = {out!r}", pathlib.Path(workdir).absolute()
    target = check_new_folder(out, shown)
    dense, fingerprint = _dense_run(workdir)
    config, options = _wanted(dense, config_file, overrides, every, router_std, noise)
    tokenizer = config.data.tokenizer
    setup = prepare.prepare(config)
    saved = tokenizers.load_saved(source / run_dir.TOKENIZER)
    own = source / run_dir.TOKENIZER / tokenizers.FILE
    check(
        saved.fingerprint == setup.dataset.tokenizer.fingerprint, "data.tokenizer", tokenizer,
        "is not the one that the dense model was trained with; use "
        + (str(own) if own.is_file() else "'bytes'"),
    )  # fmt: skip
    _, variables = restore.load(source)
    key = jax.random.key(config.seed)
    _, variables = upcycle(_source(config.model, dense.model), variables, options, key)
    state = first_state(variables, setup)
    if source in pathlib.Path(tokenizer).parents:  # the new run has its own copy
        tokenizer = str(target / run_dir.TOKENIZER / tokenizers.FILE)
    config = with_tokenizer(setup.config, tokenizer)
    origin = {"upcycled": str(source), "fingerprint": fingerprint,
              "router_std": router_std, "noise": noise}  # fmt: skip
    with new_run(target, shown, "upcycle", config, setup, state, origin):
        pass
    params = counts.count(config.model, config.train.seq_len).params
    return {
        "workdir": str(target),
        "from": str(source),
        "parameters": params.total + params.mtp,
        "active_parameters": params.active.with_head,
        "shards": config.model.d_ff // config.model.moe.d_expert,
        "config_file": str(target / CONFIG_FILE),
        "fingerprint": run_dir.read_record(target)["fingerprint"],
    }


def format_upcycle(result: Mapping[str, Any]) -> str:
    """What was made, and how to go on."""
    held, active = (text.parameters(result[k]) for k in ("parameters", "active_parameters"))
    return (
        f"{result['workdir']}: {held} parameters, {active} active with head, each dense layer in "
        f"{result['shards']} shard(s)\n"
        f"to train it: moejax train --config={result['config_file']} --workdir={result['workdir']}"
    )


def _dense_run(workdir: str) -> tuple[RunConfig, str]:
    """The run's config and its fingerprint; refuses a folder without a dense run."""
    folder = pathlib.Path(workdir)
    if not (folder / run_dir.CONFIG).is_file():
        raise UserError(f"--workdir = {workdir!r}: no run is there; give a dense run's folder")
    record = run_dir.read_record(folder)
    dense = run_dir.recorded(record)
    if dense.model.layers("moe"):
        raise UserError(
            f"--workdir = {workdir!r}: the run's model already has MoE layers; give a dense run"
        )
    return dense, record["fingerprint"]


def _wanted(
    dense: RunConfig,
    config_file: str | None,
    overrides: Sequence[str],
    every: int,
    router_std: float,
    noise: float,
) -> tuple[RunConfig, UpcycleOptions]:
    """The new run's config, and how its model comes of the dense one."""
    flags = (("--every", every, 1), ("--router-std", router_std, 0), ("--noise", noise, 0))
    for name, value, least in flags:
        check(value >= least, name, value, f"must be at least {least}")
    user = mechanism.load(config_file, ()) if config_file else {}
    user = mechanism.override(user, overrides)
    check(
        user.get("moe") is not None, "moe", None,
        "says what the experts are; set moe.num_experts, moe.top_k and moe.d_expert",
    )  # fmt: skip
    base, changed = dense.to_dict(), user.get("model") or {}
    for block in ("start", "distill"):  # of the dense run, which is done
        base.pop(block, None)
    # A dense model's default width is another one than an MoE model's, so it is spelled out.
    base["model"]["d_ff"] = dense.model.dense_width
    config = run_config.from_dict(merge(base, user))
    segments = config.model.segments if changed.get("segments") else ()
    first = config.model.first_k_dense if "first_k_dense" in changed else 0
    options = UpcycleOptions(config.model.moe, first, every, segments, router_std, noise)
    model = upcycled_config(_source(config.model, dense.model), options)
    return dataclasses.replace(config, model=model), options


def _source(wanted: ModelConfig, dense: ModelConfig) -> ModelConfig:
    """The dense model, run as the new one will be; refuses another architecture."""
    layers = {"segments": dense.segments, "first_k_dense": dense.first_k_dense}
    source = dataclasses.replace(wanted, moe=None, d_ff=dense.dense_width, **layers)
    ours, theirs = architecture(source), architecture(dense)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"config: model has {name} = {ours.get(name)!r}, the dense run's has "
                f"{theirs.get(name)!r}; leave it out"
            )
    return source
