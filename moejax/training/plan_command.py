"""``moejax plan``: which model, tokens and hardware the flags or the config mean."""

import dataclasses
import math
from argparse import Namespace
from typing import Any

from moejax.config import ConfigError, UserError, check, nearest
from moejax.cost import budget_text, exchange, hardware, utilisation
from moejax.cost.budget_plan import DEFAULT_LAW, chosen_config, plan_budget
from moejax.cost.compare import compare, default_expert_devices
from moejax.cost.cost_config import CostConfig
from moejax.cost.memory import Placement
from moejax.cost.plan import make_plan
from moejax.cost.prices import Price
from moejax.cost.published import published
from moejax.cost.serving_plan import plan_serving
from moejax.cost.utilisation import Utilisation
from moejax.interop.hf import config_from_hf
from moejax.models.model_config import ModelConfig
from moejax.models.presets import PRESETS
from moejax.parallel import check_fits
from moejax.parallel.layout import placed, suggest
from moejax.training import run_config
from moejax.training.lowering import lowered
from moejax.training.prepare import (
    layout_of,
    optimizer_bytes,
    placement_of,
    second_model,
    with_remedies,
)

DEFAULT_HARDWARE, DEFAULT_SEQ_LEN = "h100_sxm", 4096
# Flags of a deployment.
_SERVING = ("list_price", "input_per_output", "cache_hit_share")
# Flags that say how a model is trained: of no use to what chooses the model, or has no training.
_TRAINING = ("measured", "exchange", "overlap", "expert_devices", "compare", "lower")


def plan(options: Namespace) -> dict[str, Any]:
    """The plan that the flags of ``moejax plan`` ask for.

    Flags win over the config. With ``--model`` or ``--hf-config`` alone, the hardware is an H100,
    sequences have 4,096 positions and the mesh is the suggested one; tokens must be given. The
    config's own tokens are its steps times its batch, padding counted; the plan that a run prints
    knows its text and leaves padding out.

    With ``--budget`` there is neither config nor model: it chooses them (``plan_budget``). With
    ``--compare`` there are several chips and a table (``moejax.cost.compare``). ``--published``
    plans nothing: it rebuilds bills in print (``moejax.cost.published``). ``--serve`` is the bill
    of a deployment (``moejax.cost.serving_plan``). ``--lower`` adds what a compiled step says
    (``moejax.training.lowering``).

    Raises:
      UserError: not exactly one of ``--config``, ``--model`` and ``--hf-config``, flags that
        contradict each other, or one out of range.
    """
    if options.serve is not None:
        return _of_serving(options)
    for flag in _SERVING:
        value = getattr(options, flag)
        check(
            value is None, f"--{flag.replace('_', '-')}", value, "belongs to --serve; leave it out"
        )
    if options.published is not None:
        return _published(options)
    if options.budget is not None:
        return _of_budget(options)
    for flag in ("law", "output"):
        check(getattr(options, flag) is None, f"--{flag}", getattr(options, flag),
              "belongs to --budget; leave it out")  # fmt: skip
    if sum(map(bool, (options.config, options.model, options.hf_config))) != 1:
        raise UserError("give either --config=FILE, --model=NAME or --hf-config=config.json")
    _check_numbers(options)
    check(
        not options.lower or options.config is not None, "--lower", True,
        "compiles a config's training step, and a published model says nothing of its training; "
        "give --config=FILE",
    )  # fmt: skip
    check(
        options.mfu is None or not options.measured, "--mfu", options.mfu,
        "contradicts --measured, which says the utilisation; leave one out",
    )  # fmt: skip
    subject = _config_subject(options) if options.config else _model_subject(options)
    _check_exchange(options, subject.model)
    if options.compare is not None:
        check(not options.lower, "--lower", True, "compiles one config's step, and --compare has "
              "no layout; leave out one of the two")  # fmt: skip
        return _comparison(options, subject)
    found = _one_plan(options, subject)
    if options.lower:
        found["lowered"] = lowered(options.config, options.overrides, options.devices)
    return found


def _of_serving(options: Namespace) -> dict[str, Any]:
    others = (
        "config", "model", "hf_config", "published", "budget", "tokens", "seq_len", "region", "mfu",
        "law", "output", *_TRAINING,
    )  # fmt: skip
    for flag in others:
        value = getattr(options, flag)
        check(value is None, f"--{flag.replace('_', '-')}", value,
              "is of training, and --serve of a deployment; leave out one of the two")  # fmt: skip
    chip = options.hardware or DEFAULT_HARDWARE
    return plan_serving(
        options.serve,
        hardware=chip,
        devices=1 if options.devices is None else options.devices,
        price=with_flags(CostConfig(hardware=chip), options).rate(chip),
        list_price=options.list_price,
        input_per_output=options.input_per_output or 0.0,
        cache_hit_share=options.cache_hit_share or 0.0,
    )


def _published(options: Namespace) -> dict[str, Any]:
    others = (
        "config", "model", "hf_config", "budget", "tokens", "seq_len", "hardware", "devices",
        "price", "price_kind", "price_book", "region", "mfu", "law", "output", *_TRAINING,
    )  # fmt: skip
    for flag in others:
        value = getattr(options, flag)
        check(value is None, f"--{flag.replace('_', '-')}", value,
              "changes no published bill; leave it out beside --published")  # fmt: skip
    return published(options.published)


def _check_numbers(options: Namespace) -> None:
    for name in ("tokens", "seq_len", "devices", "expert_devices"):
        value = getattr(options, name)
        flag = f"--{name.replace('_', '-')}"
        good = value is None or (value > 0 and math.isfinite(value))
        check(good, flag, value, "must be a finite number above zero")


def _check_exchange(options: Namespace, model: ModelConfig) -> None:
    for name in ("exchange", "overlap", "expert_devices"):
        value = getattr(options, name)
        check(
            value is None or model.layers("moe") > 0, f"--{name.replace('_', '-')}", value,
            "has no use for a model without experts; leave it out",
        )  # fmt: skip


def _of_budget(options: Namespace) -> dict[str, Any]:
    for flag in ("config", "model", "hf_config", "tokens", *_TRAINING):
        value = getattr(options, flag)
        reason = "is what --budget chooses; leave out one of the two"
        if flag in _TRAINING:
            reason = "does not go with --budget; leave out one of the two"
        check(value is None, f"--{flag.replace('_', '-')}", value, reason)
    _check_numbers(options)
    chip, seq_len = options.hardware or DEFAULT_HARDWARE, options.seq_len or DEFAULT_SEQ_LEN
    found = plan_budget(
        options.budget,
        hardware=chip,
        seq_len=seq_len,
        law=options.law or DEFAULT_LAW,
        devices=options.devices,
        cost=with_flags(CostConfig(), options),
        mfu=options.mfu,
        mfu_source="--mfu",
        place=placed(chip, seq_len),
    )
    found["plan"]["layout"]["source"] = "suggested"
    if options.output:
        budget_text.write_config(found, chosen_config(found), options.output)
    return found


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is planned, before any hardware: ``config`` is None for a published model."""

    model: ModelConfig
    tokens: float
    seq_len: int
    cost: CostConfig
    config: run_config.RunConfig | None = None

    def used(self, options: Namespace, chip: str) -> Utilisation:
        """The utilisation to assume: flag, measured, config, published, default, in this order."""
        if options.mfu is not None:
            return utilisation.given(options.mfu, "--mfu")
        if options.measured:
            return utilisation.measured(options.measured, chip)
        if self.cost.mfu is not None:
            return utilisation.given(self.cost.mfu, "config")
        return utilisation.assumed(chip, self.model, self.seq_len)


def _model(options: Namespace) -> ModelConfig:
    if options.hf_config:
        return config_from_hf(options.hf_config)
    known = options.model in PRESETS
    check(known, "--model", options.model, f"no such model; {nearest(options.model, PRESETS)}")
    return PRESETS[options.model]


def _model_subject(options: Namespace) -> _Subject:
    model = _model(options)
    if options.tokens is None:
        raise ConfigError("--tokens", None, "a published model needs the tokens to train it on")
    cost = with_flags(CostConfig(hardware=options.hardware or DEFAULT_HARDWARE), options)
    seq_len = options.seq_len or DEFAULT_SEQ_LEN
    return _Subject(model, options.tokens, seq_len, cost)


def _config_subject(options: Namespace) -> _Subject:
    config = run_config.load(options.config, options.overrides)
    train = config.train
    seq_len = options.seq_len or train.seq_len
    tokens = options.tokens or train.steps * train.batch_size * seq_len
    return _Subject(config.model, tokens, seq_len, with_flags(config.cost, options), config)


def _one_plan(options: Namespace, subject: _Subject) -> dict[str, Any]:
    cost, config = subject.cost, subject.config
    chip = options.hardware or cost.hardware
    if chip == "auto":
        import jax

        device = jax.devices()[0]
        chip = hardware.detect(device.platform, device.device_kind)
    model, devices, placement, source = subject.model, options.devices or 1, None, "config"
    state = 8.0 if config is None else optimizer_bytes(config.optim, model)
    if config is not None:
        layout = layout_of(config.mesh, options.devices)
        used_devices = hardware.cpu_cores() if chip == "cpu" else layout.devices
        devices = options.devices or used_devices
        _check_mesh(config, layout.devices if chip == "cpu" else devices)
        placement = placement_of(config, layout)
    suggested = suggest(
        model, hardware=chip, devices=placement.layout.devices if chip == "cpu" else devices,
        seq_len=subject.seq_len, optimizer_bytes=state,
    )  # fmt: skip
    if placement is None:
        # A preset says nothing of its training, which is planned as suggested.
        source, model = "suggested", suggested.model
        placement = Placement(suggested.layout, optimizer_bytes=state)
    found = make_plan(
        model,
        tokens=subject.tokens,
        seq_len=subject.seq_len,
        hardware=chip,
        devices=devices,
        price=cost.rate(chip),
        used=subject.used(options, chip),
        region=cost.region,
        pue=cost.pue,
        dollars_per_kwh=cost.dollars_per_kwh,
        purchase=cost.purchase(chip),
        placement=placement,
        how=exchange.transport(options.exchange or "moejax", options.overlap),
        expert_devices=options.expert_devices,
        second=None if config is None else second_model(config),
    )
    found["layout"]["source"] = source
    found["suggested_layout"] = suggested.to_dict()
    return found if source == "suggested" else with_remedies(found, model, placement)


def _check_mesh(config: run_config.RunConfig, devices: int) -> None:
    """Raises ConfigError where the config's mesh needs other devices, or does not divide it."""
    train = config.train
    shape = config.mesh.shape(devices)
    check_fits(shape, config.model, train.batch_size // train.micro_batches, train.seq_len)


def _comparison(options: Namespace, subject: _Subject) -> dict[str, Any]:
    for flag in ("hardware", "price"):
        value = getattr(options, flag)
        check(value is None, f"--{flag}", value,
              "is one chip's, and --compare has several; use --price-book for your own rates"
              if flag == "price" else "contradicts --compare, which names the chips")  # fmt: skip
    names = options.compare.split(",")
    for name in names:
        hardware.lookup(name)
    check(len(set(names)) == len(names), "--compare", options.compare, "names a chip twice")
    check("cpu" not in names, "--compare", options.compare,
          "a CPU's peak is this machine's own; compare accelerators")  # fmt: skip
    cost, mesh = subject.cost, subject.config and subject.config.mesh
    check(cost.price is None, "cost.price", cost.price,
          "is one chip's, and --compare has several; use cost.price_book")  # fmt: skip
    experts = options.expert_devices
    if experts is None:
        own = 1 if mesh is None else mesh.expert
        experts = own if own > 1 else default_expert_devices(subject.model, names[0])
    return compare(
        subject.model,
        hardware=names,
        prices={name: _rate(cost, name) for name in names},
        purchases={name: cost.purchase(name) for name in names},
        tokens=subject.tokens,
        seq_len=subject.seq_len,
        devices=options.devices,
        used=subject.used(options, names[0]),
        how=exchange.transport(options.exchange or "deepseek_v3", options.overlap),
        expert_devices=experts,
        pue=cost.pue,
        dollars_per_kwh=cost.dollars_per_kwh,
    )


def _rate(cost: CostConfig, chip: str) -> Price | None:
    """A chip's rate, None where nobody says one: hours can be compared without dollars."""
    try:
        return dataclasses.replace(cost, price=None).rate(chip)
    except ConfigError as error:
        if error.field != "cost.price":
            raise
        return None


def with_flags(cost: CostConfig, options: Namespace) -> CostConfig:
    """A config's way to a rate with what the flags say of it: theirs goes first.

    Raises:
      ConfigError: ``--price`` and ``--price-kind`` together, or a value that cannot be used.
    """
    if options.region is not None:
        cost = dataclasses.replace(cost, region=options.region)
    if options.price_book is not None:
        cost = dataclasses.replace(cost, price_book=options.price_book)
    if options.price is not None or options.price_kind is not None:
        cost = dataclasses.replace(cost, price=options.price, price_kind=options.price_kind)
    return cost
