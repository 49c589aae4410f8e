"""``moejax plan``: which model, tokens and hardware the flags or the config mean."""

import dataclasses
import math
from argparse import Namespace
from typing import Any

from moejax.config import ConfigError, UserError, check, nearest
from moejax.cost import budget_text, hardware
from moejax.cost.budget_plan import DEFAULT_LAW, chosen_config, plan_budget
from moejax.cost.cost_config import CostConfig
from moejax.cost.plan import make_plan
from moejax.models.presets import PRESETS
from moejax.training import run_config
from moejax.training.prepare import parameter_shards

DEFAULT_HARDWARE, DEFAULT_SEQ_LEN = "h100_sxm", 4096


def plan(options: Namespace) -> dict[str, Any]:
    """The plan that the flags of ``moejax plan`` ask for.

    Flags win over the config. With ``--model`` alone, the hardware is an H100 and sequences have
    4,096 positions; tokens must be given. The config's own tokens are its steps times its batch,
    padding counted; the plan that a run prints knows its text and leaves padding out.

    With ``--budget`` there is neither config nor model: it chooses them (``plan_budget``).

    Raises:
      UserError: neither or both of ``--config`` and ``--model``, or a flag out of range.
    """
    if options.budget is not None:
        return _of_budget(options)
    for flag in ("law", "output"):
        check(getattr(options, flag) is None, f"--{flag}", getattr(options, flag),
              "belongs to --budget; leave it out")  # fmt: skip
    if bool(options.config) == bool(options.model):
        raise UserError("give either --config=FILE or --model=NAME")
    _check_numbers(options)
    return _of_config(options) if options.config else _of_model(options)


def _check_numbers(options: Namespace) -> None:
    for name in ("tokens", "seq_len", "devices"):
        value = getattr(options, name)
        flag = f"--{name.replace('_', '-')}"
        good = value is None or (value > 0 and math.isfinite(value))
        check(good, flag, value, "must be a finite number above zero")


def _of_budget(options: Namespace) -> dict[str, Any]:
    for flag in ("config", "model", "tokens"):
        value = getattr(options, flag)
        check(value is None, f"--{flag}", value,
              "is what --budget chooses; leave out one of the two")  # fmt: skip
    _check_numbers(options)
    found = plan_budget(
        options.budget,
        hardware=options.hardware or DEFAULT_HARDWARE,
        seq_len=options.seq_len or DEFAULT_SEQ_LEN,
        law=options.law or DEFAULT_LAW,
        devices=options.devices,
        price=options.price,
        mfu=options.mfu,
        mfu_source="--mfu",
    )
    if options.output:
        budget_text.write_config(found, chosen_config(found), options.output)
    return found


def _of_model(options: Namespace) -> dict[str, Any]:
    known = options.model in PRESETS
    check(known, "--model", options.model, f"no such model; {nearest(options.model, PRESETS)}")
    if options.tokens is None:
        raise ConfigError("--tokens", None, "a published model needs the tokens to train it on")
    chip = options.hardware or DEFAULT_HARDWARE
    cost = with_flags(CostConfig(), options)
    return make_plan(
        PRESETS[options.model],
        tokens=options.tokens,
        seq_len=options.seq_len or DEFAULT_SEQ_LEN,
        hardware=chip,
        devices=options.devices or 1,
        price=cost.rate(chip),
        purchase=cost.purchase(chip),
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
    cost = with_flags(cost, options)
    return make_plan(
        config.model,
        tokens=options.tokens or train.steps * train.batch_size * seq_len,
        seq_len=seq_len,
        hardware=chip,
        devices=options.devices or devices,
        price=cost.rate(chip),
        mfu=mfu,
        mfu_source=None if mfu is None else "config" if options.mfu is None else "--mfu",
        region=cost.region,
        pue=cost.pue,
        dollars_per_kwh=cost.dollars_per_kwh,
        purchase=cost.purchase(chip),
        shards=parameter_shards(config.model, seq_len, mesh),
        tokens_per_device=max(1, rows) * seq_len,
    )


def with_flags(cost: CostConfig, options: Namespace) -> CostConfig:
    """A config's way to a rate with what the flags say of it: theirs goes first.

    Raises:
      ConfigError: ``--price`` and ``--price-kind`` together, or a value that cannot be used.
    """
    if options.price_book is not None:
        cost = dataclasses.replace(cost, price_book=options.price_book)
    if options.price is not None or options.price_kind is not None:
        cost = dataclasses.replace(cost, price=options.price, price_kind=options.price_kind)
    return cost
