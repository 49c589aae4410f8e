"""``moejax plan``: which model, tokens and hardware the flags or the config mean."""

import math
from argparse import Namespace
from typing import Any

from moejax.config import ConfigError, UserError, check, nearest
from moejax.cost import hardware, prices
from moejax.cost.plan import make_plan
from moejax.interop.hf import config_from_hf
from moejax.models import ModelConfig
from moejax.models.presets import PRESETS
from moejax.training import run_config
from moejax.training.optimizers import state_bytes
from moejax.training.prepare import parameter_shards

DEFAULT_HARDWARE, DEFAULT_SEQ_LEN = "h100_sxm", 4096


def plan(options: Namespace) -> dict[str, Any]:
    """The plan that the flags of ``moejax plan`` ask for.

    Flags win over the config. With ``--model`` or ``--hf-config`` alone, the hardware is an H100
    and sequences have 4,096 positions; tokens must be given. The config's own tokens are its steps
    times its batch, padding counted; the plan that a run prints knows its text and leaves padding
    out.

    Raises:
      UserError: not exactly one of ``--config``, ``--model`` and ``--hf-config``, or a flag out of
        range.
    """
    if sum(map(bool, (options.config, options.model, options.hf_config))) != 1:
        raise UserError("give either --config=FILE, --model=NAME or --hf-config=config.json")
    for name in ("tokens", "seq_len", "devices"):
        value = getattr(options, name)
        flag = f"--{name.replace('_', '-')}"
        good = value is None or (value > 0 and math.isfinite(value))
        check(good, flag, value, "must be a finite number above zero")
    return _of_config(options) if options.config else _of_model(options, _model(options))


def _model(options: Namespace) -> ModelConfig:
    if options.hf_config:
        return config_from_hf(options.hf_config)
    known = options.model in PRESETS
    check(known, "--model", options.model, f"no such model; {nearest(options.model, PRESETS)}")
    return PRESETS[options.model]


def _of_model(options: Namespace, model: ModelConfig) -> dict[str, Any]:
    if options.tokens is None:
        raise ConfigError("--tokens", None, "a published model needs the tokens to train it on")
    chip = options.hardware or DEFAULT_HARDWARE
    return make_plan(
        model,
        tokens=options.tokens,
        seq_len=options.seq_len or DEFAULT_SEQ_LEN,
        hardware=chip,
        devices=options.devices or 1,
        price=prices.resolve(chip, options.price),
        mfu=options.mfu,
        mfu_source=None if options.mfu is None else "--mfu",
    )


def _of_config(options: Namespace) -> dict[str, Any]:
    config = run_config.load(options.config, options.overrides)
    train, cost = config.train, config.cost
    chip = options.hardware or cost.hardware
    if chip == "auto":
        import jax

        device = jax.devices()[0]
        chip = hardware.detect(device.platform, device.device_kind)
    seq_len = options.seq_len or train.seq_len
    mfu = cost.mfu if options.mfu is None else options.mfu
    mesh = config.mesh
    rest = mesh.fsdp * mesh.expert * mesh.tensor
    # mesh.data = 0 takes the devices that there are: those of --devices, in a plan.
    copies = mesh.data or max(1, (options.devices or 1) // rest)
    devices = hardware.cpu_cores() if chip == "cpu" else copies * rest
    rows = train.batch_size // train.micro_batches // (copies * mesh.fsdp * mesh.expert)
    price = options.price if options.price is not None else cost.price
    return make_plan(
        config.model,
        tokens=options.tokens or train.steps * train.batch_size * seq_len,
        seq_len=seq_len,
        hardware=chip,
        devices=options.devices or devices,
        price=prices.resolve(chip, price),
        mfu=mfu,
        mfu_source=None if mfu is None else "config" if options.mfu is None else "--mfu",
        region=cost.region,
        optimizer_bytes=state_bytes(config.optim),
        shards=parameter_shards(config.model, seq_len, mesh),
        tokens_per_device=max(1, rows) * seq_len,
    )
