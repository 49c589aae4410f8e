"""What an ablation is: a base config, variants as visible edits, seeds, and what is held equal."""

import copy
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_collections

from moejax import config as mechanism
from moejax.config import ConfigError, UserError, build, check, nearest
from moejax.interop.upcycle import UpcycleOptions, upcycled_config
from moejax.training import run_config
from moejax.training.run_config import RunConfig

METRICS = ("val_bits_per_byte", "val_loss", "loss")
# What is concluded and kept, not what is computed: a resumed ablation may change it.
MAY_CHANGE = ("claim", "smallest_effect", "keep_checkpoints")
# What the grid sets in every cell, or what must be the same in all of them.
_OWNED = ("seed", "stage", "train.steps", "checkpoint", "budget", "cost")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclasses.dataclass(frozen=True)
class BudgetSpec:
    """What is held equal (block ``budget``).

    Attributes:
      hold: ``tokens``; ``flops``, model FLOPs of training; ``device_seconds``, seconds of training
        steps times devices; or ``dollars``, those at the device's rate. Start-up, compilation and
        evaluation are billed, but belong to no budget.
      amounts: of one run, in that unit; several make a ladder.
      seconds_per_step: for budgets of time and dollars, by variant, or the folder of an ablation
        that measured them; None measures them once.
    """

    hold: Literal["tokens", "flops", "device_seconds", "dollars"]
    amounts: tuple[float, ...]
    seconds_per_step: Any = None

    def __post_init__(self) -> None:
        check(bool(self.amounts), "budget.amounts", self.amounts, "is empty; give an amount")
        for amount in self.amounts:
            check(amount > 0, "budget.amounts", self.amounts, "must be above zero")
        rising = all(a < b for a, b in zip(self.amounts, self.amounts[1:], strict=False))
        check(rising, "budget.amounts", self.amounts, "must rise, each once")
        given = self.seconds_per_step
        check(
            given is None or self.by_time, "budget.seconds_per_step", given,
            f"has no use with budget.hold = {self.hold!r}; leave it out",
        )  # fmt: skip

    @property
    def by_time(self) -> bool:
        """Whether steps follow from measured seconds."""
        return self.hold in ("device_seconds", "dollars")


@dataclasses.dataclass(frozen=True)
class TuningSpec:
    """How a variant finds its learning rate (block ``tuning``).

    Attributes:
      factors: of the variant's own learning rate: the bracket.
      seeds: of the tuning runs; none of them may be one of the ablation's.
      field: what is tuned.
      max_share: most that the tuning of a variant may spend, as a share of what its runs spend.
      amount: budget of one tuning run; None takes the smallest of ``budget.amounts``, or less where
        the bracket and one more factor would not fit in ``max_share``.
    """

    factors: tuple[float, ...]
    seeds: tuple[int, ...]
    field: Literal["optim.learning_rate"] = "optim.learning_rate"
    max_share: float = 0.5
    amount: float | None = None

    def __post_init__(self) -> None:
        check(bool(self.factors), "tuning.factors", self.factors, "is empty; give factors, or "
              "tuning = None")  # fmt: skip
        for factor in self.factors:
            check(factor > 0, "tuning.factors", self.factors, "must be above zero")
        _check_seeds("tuning.seeds", self.seeds, least=1)
        check(self.max_share > 0, "tuning.max_share", self.max_share, "must be above zero")
        once = len(set(self.factors)) == len(self.factors)
        check(once, "tuning.factors", self.factors, "names a factor twice")
        good = self.amount is None or self.amount > 0
        check(good, "tuning.amount", self.amount, "must be above zero, or None")


@dataclasses.dataclass(frozen=True)
class UpcycleSpec:
    """How a variant begins as a dense model (an entry of ``upcycle``); its budget pays for that.

    Attributes:
      edits: of the variant, that make the dense run; ``"moe": None`` among them.
      share: of the variant's budget that the dense run gets.
      router_std, noise: see ``moejax.interop.upcycle.UpcycleOptions``.
    """

    edits: Any
    share: float
    router_std: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check(isinstance(self.edits, Mapping), "upcycle.edits", self.edits, "must be fields and "
              "their values")  # fmt: skip
        check(0 < self.share < 1, "upcycle.share", self.share, "must be above 0 and below 1")


@dataclasses.dataclass(frozen=True)
class ClaimSpec:
    """A published claim that the ablation tests (block ``claim``).

    Attributes:
      text: what is claimed.
      source: where.
      direction: the variant that it says is the best; None where it names none.
      numbers: the published figures, in words.
    """

    text: str
    source: str = ""
    direction: str | None = None
    numbers: str = ""


@dataclasses.dataclass(frozen=True)
class AblationSpec:
    """An ablation as its config file has it.

    Attributes:
      name: of the ablation.
      base: the run that the variants are edits of: the blocks of a run's config.
      variants: name -> dotted fields and their values. A name of a block replaces the whole block;
        ``"moe": None`` drops it, and the router with it.
      reference: the variant that the others are compared with.
      seeds: one run of every variant for each; at least two.
      budget: what is held equal.
      tuning: None leaves every variant at its own learning rate.
      metric: a field of the results that is compared; lower is better.
      smallest_effect: a difference below it does not matter, in the metric's unit; None where
        nobody said.
      claim: None where there is none.
      upcycle: of variants that are upcycled, how (``UpcycleSpec``): a dense run comes first, of
        which each seed has its own.
      keep_checkpoints: of ended cells. ``sample``: the last one of each variant's first seed at
        the largest budget, for ``moejax inspect`` and the report, and of each failed cell, up to
        256 MiB each; ``last``: the last one of every cell; True: all of them; False: none.
    """

    name: str
    base: Any
    variants: Any
    reference: str
    seeds: tuple[int, ...]
    budget: BudgetSpec
    tuning: TuningSpec | None = None
    metric: Literal["val_bits_per_byte", "val_loss", "loss"] = "val_bits_per_byte"
    smallest_effect: float | None = None
    claim: ClaimSpec | None = None
    upcycle: Any = None
    keep_checkpoints: Any = "sample"

    def __post_init__(self) -> None:
        check(isinstance(self.base, Mapping), "base", self.base, "must be a run's blocks")
        check(
            isinstance(self.variants, Mapping) and len(self.variants) > 1,
            "variants", self.variants, "must name two or more variants with their edits",
        )  # fmt: skip
        for name in self.variants:
            good = isinstance(name, str) and _NAME.fullmatch(name)
            check(bool(good), "variants", name, "a name is of letters, digits and any of _.+-")
        check(
            self.reference in self.variants, "reference", self.reference,
            f"is not a variant; {nearest(self.reference, self.variants)}",
        )  # fmt: skip
        _check_seeds("seeds", self.seeds, least=2)
        shared = set(self.seeds) & set(self.tuning.seeds if self.tuning else ())
        check(
            not shared, "tuning.seeds", sorted(shared),
            "are seeds of the ablation too, and its verdict would favour the tuned; choose others",
        )  # fmt: skip
        effect = self.smallest_effect
        check(effect is None or effect >= 0, "smallest_effect", effect, "must not be below zero")
        kept = self.keep_checkpoints
        check(
            kept in (True, False, "last", "sample"), "keep_checkpoints", kept,
            "must be True, False, 'last' or 'sample'",
        )  # fmt: skip
        direction = self.claim and self.claim.direction
        check(
            direction is None or direction in self.variants, "claim.direction", direction,
            "is not a variant; name the one that the claim favours, or None",
        )  # fmt: skip
        given = self.budget.seconds_per_step
        if given is not None:
            _check_seconds(given, self.variants)
        self.run_config(None)
        for name in self.variants:
            self.run_config(name)
        _check_upcycle(self)

    def upcycled(self, variant: str) -> UpcycleSpec | None:
        """How a variant is upcycled; None where it is not."""
        values = (self.upcycle or {}).get(variant)
        return None if values is None else build(UpcycleSpec, values, f"upcycle.{variant}")

    def dense_config(self, variant: str) -> RunConfig:
        """The dense run that an upcycled variant begins with, before seed and steps are set."""
        edits = {**self.variants[variant], **self.upcycled(variant).edits}
        dense = dataclasses.replace(self, variants={**self.variants, variant: edits}, upcycle=None)
        return dense.run_config(variant)

    def run_config(self, variant: str | None) -> RunConfig:
        """A variant's run, as it stands before the grid sets seed and steps; None: the base's.

        Raises:
          ConfigError: an edit of what is not the variant's to set, an unknown field (the nearest
            is offered), a value that cannot be.
        """
        where = "base" if variant is None else f"variants.{variant}"
        edits = {} if variant is None else self.variants[variant]
        check(isinstance(edits, Mapping), where, edits, "must be fields and their values")
        for field in edits:
            owned = [f for f in _OWNED if field == f or field.startswith(f + ".")]
            if owned:
                remedy = "is the same in all variants; leave it out, or set it in base"
                raise ConfigError(f"{where}.{field}", edits[field], remedy)
        try:
            config = run_config.from_dict(edited(self.base, edits))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.field}", error.value, error.remedy) from None
        limits = dataclasses.asdict(config.budget)
        check(
            not any(limits.values()), "base.budget", limits,
            "would stop some cells short of the others; leave it out",
        )  # fmt: skip
        return config

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` reads it."""
        return mechanism.to_dict(self)


def edited(base: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks of a run with a variant's edits; see ``AblationSpec.variants``."""
    values = copy.deepcopy(dict(base))
    if "moe" in edits and edits["moe"] is None:
        values.pop("router", None)
    for field, value in edits.items():
        *blocks, last = field.split(".")
        target = values
        for i, block in enumerate(blocks):
            target = target.setdefault(block, {})
            where = ".".join(blocks[: i + 1])
            check(isinstance(target, dict), where, target, f"is a value, not a block with {last!r}")
        target[last] = copy.deepcopy(value)
    return values


def load(path: str, overrides: Sequence[str] = ()) -> AblationSpec:
    """Reads an ablation's config file, with command-line settings.

    Args:
      path: a Python file whose ``get_config()`` returns a mapping: a plain dictionary, which may
        hold ConfigDicts, or a ConfigDict (that takes dotted edits with ``allow_dotted_keys=True``).
      overrides: such as ``seeds=[0,1]``, ``base.train.batch_size=8`` or
        ``variants.aux.router.aux_weight=0.1``, which edits the variant's dotted field.

    Raises:
      UserError, ConfigError: see ``moejax.config.load``, and whatever of the ablation cannot be.
    """
    values = _plain(mechanism.run_file(path, "get_config", "--config"))
    if not isinstance(values, dict):
        found = type(values).__name__
        raise UserError(f"--config = {path!r}: get_config() returned a {found}; return a mapping")
    for setting in overrides:
        name, _, text = setting.partition("=")
        known = values["variants"] if isinstance(values.get("variants"), dict) else {}
        inside = [v for v in known if name.startswith(f"variants.{v}.")]
        if inside and "=" in setting and isinstance(known[max(inside, key=len)], dict):
            variant = max(inside, key=len)
            field = name.removeprefix(f"variants.{variant}.")
            known[variant][field] = mechanism.parse_literal(text)
        else:
            mechanism.override(values, [setting])
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> AblationSpec:
    """Builds an ablation from its config's mapping, or from what ``to_dict`` made.

    Raises:
      ConfigError: whatever of it cannot be, by field.
    """
    values = dict(values)
    budget = values.get("budget")
    if isinstance(budget, Mapping) and isinstance(budget.get("seconds_per_step"), str):
        measured = _recorded_seconds(budget["seconds_per_step"])
        values["budget"] = {**budget, "seconds_per_step": measured}
    return build(AblationSpec, values)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields of two ``to_dict``s that differ and may not: ``seeds ([0, 1] -> [0, 2])``."""
    # What was read from a file has lists where there were tuples.
    before, after = (json.loads(json.dumps(values)) for values in (old, new))
    return run_config.differences(before, after, MAY_CHANGE)


def _plain(values: Any) -> Any:
    """ConfigDicts and mappings, however nested, as plain dictionaries."""
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    if isinstance(values, Mapping):
        return {name: _plain(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    return values


def _check_seeds(field: str, seeds: Sequence[int], least: int) -> None:
    check(
        len(seeds) >= least, field, list(seeds),
        "an interval needs two seeds or more; add some" if least > 1 else "is empty; give a seed",
    )  # fmt: skip
    check(len(set(seeds)) == len(seeds), field, list(seeds), "names a seed twice")
    for seed in seeds:
        check(0 <= seed < 2**32, field, seed, "must be from 0 to below 2**32")


def _check_seconds(given: Any, variants: Mapping[str, Any]) -> None:
    field = "budget.seconds_per_step"
    check(isinstance(given, Mapping), field, given, "must be seconds by variant, or a folder")
    missing = [name for name in variants if name not in given]
    check(not missing, field, given, f"lacks {', '.join(missing)}; give every variant's")
    for value in given.values():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        check(number and 0 < value < math.inf, field, value, "must be seconds above zero")


def _check_upcycle(spec: AblationSpec) -> None:
    given = spec.upcycle or {}
    check(isinstance(given, Mapping), "upcycle", given, "must be variants and how they are made")
    for variant in given:
        where = f"upcycle.{variant}"
        check(variant in spec.variants, where, variant, f"is not a variant; "
              f"{nearest(variant, spec.variants)}")  # fmt: skip
        check(
            len(spec.budget.amounts) == 1, "budget.amounts", spec.budget.amounts,
            f"cannot be a ladder, since {variant!r} is upcycled at one point; give one amount",
        )  # fmt: skip
        check(
            not spec.budget.by_time, "budget.hold", spec.budget.hold,
            f"is not possible, since {variant!r} is upcycled; use 'flops' or 'tokens'",
        )  # fmt: skip
        check(spec.tuning is None, "tuning", "...", f"is not possible, since {variant!r} is "
              "upcycled; leave it out, and set learning rates in the variants")  # fmt: skip
        dense, wanted = spec.dense_config(variant).model, spec.run_config(variant).model
        check(not dense.layers("moe"), f"{where}.edits", spec.upcycled(variant).edits,
              'leave MoE layers; add "moe": None')  # fmt: skip
        check(wanted.moe is not None, f"variants.{variant}.moe", None, "is upcycled; give it MoE "
              "layers")  # fmt: skip
        try:
            upcycled_config(dense, UpcycleOptions(wanted.moe, wanted.first_k_dense))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.field}", error.value, error.remedy) from None


def _recorded_seconds(folder: str) -> dict[str, float]:
    """Seconds a step that another ablation measured."""
    path = pathlib.Path(folder) / "plan.json"
    try:
        measured = json.loads(path.read_text())["calibration"]
        return {name: entry["seconds_per_step"] for name, entry in measured.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            "budget.seconds_per_step", folder,
            f"holds no plan.json with a calibration ({error}); give an ablation's folder",
        ) from None  # fmt: skip
