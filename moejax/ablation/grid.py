"""The cells of an ablation's grid: equal budgets turned into steps, with what each will cost."""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.ablation.spec import AblationSpec, edited
from moejax.analysis.ablation_record import UNITS
from moejax.config import ConfigError, UserError, check
from moejax.training import prepare, run_config
from moejax.training.fork import fork_step
from moejax.training.run_config import RunConfig

TOLERANCE = 0.01  # how far whole steps may be from the budget


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one optimizer step of a variant takes.

    Attributes:
      tokens: targets, padding left out.
      flops: model FLOPs of training, by the experts that a token is expected to run through.
      seconds: measured, or by the plan's utilisation; see ``measured``.
      seconds_low, seconds_high: the range to reckon with.
      devices: devices billed.
      price, price_low, price_high: dollars of one device for an hour.
      hardware: name of the chip.
      measured: whether ``seconds`` was measured here.
      model: for the plan's table: ``total`` and ``active`` parameters, ``flops_per_token``.
      data: the dataset's fingerprint.
    """

    tokens: float
    flops: float
    seconds: float
    seconds_low: float
    seconds_high: float
    devices: int
    price: float
    price_low: float
    price_high: float
    hardware: str
    measured: bool
    model: Mapping[str, float]
    data: str

    def of(self, hold: str) -> float:
        """What one step costs in the unit that is held equal."""
        device_seconds = self.seconds * self.devices
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "device_seconds": device_seconds,
            "dollars": device_seconds / 3600 * self.price,
        }[hold]

    def bill(self, steps: int) -> dict[str, float]:
        """``device_hours`` and ``dollars`` of so many steps, with ``low`` and ``high`` dollars."""
        hours = steps * self.devices / 3600
        return {
            "device_hours": hours * self.seconds,
            "dollars": hours * self.seconds * self.price,
            "low": hours * self.seconds_low * self.price_low,
            "high": hours * self.seconds_high * self.price_high,
        }


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
      id: its name, and that of its folder.
      variant: which variant.
      seed: of the run.
      budget: amount that it may take, in the unit held equal.
      kind: ``tune``; ``final``, of a single budget; ``trunk``, of the largest of a ladder;
        ``branch``, of a smaller one, which begins at the trunk's checkpoint; ``dense``, what an
        upcycled variant begins with.
      learning_rate: None until the tuning has found it.
      steps: optimizer steps.
      tokens, flops: of all its steps, a trunk's shared part included.
      planned: the bill of the steps that it does itself; see ``Rates.bill``.
      factor: of a tuning run, over the variant's own learning rate.
      from_step: of a branch: where it begins; of an upcycled run: steps of the dense one.
      trunk: of a branch or an upcycled run: the cell that it begins from.
      at_steps: of a trunk: where its branches begin.
    """

    id: str
    variant: str
    seed: int
    budget: float
    kind: str
    learning_rate: float | None
    steps: int
    tokens: float
    flops: float
    planned: dict[str, float]
    factor: float | None = None
    from_step: int = 0
    trunk: str | None = None
    at_steps: tuple[int, ...] = ()

    @property
    def upcycled(self) -> bool:
        """Whether it goes on from a dense run, made into an MoE model."""
        return self.kind == "final" and self.trunk is not None

    @property
    def own_steps(self) -> int:
        """Steps that it does itself: of a branch, those after it left the trunk."""
        return self.steps if self.upcycled else self.steps - self.from_step

    @property
    def rates_name(self) -> str:
        """Whose rates its steps have: the variant's, or those of what that begins with."""
        return dense_name(self.variant) if self.kind == "dense" else self.variant

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``Cell.from_dict`` reads it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Cell":
        """Raises UserError for what is no cell, or names a folder beside the ablation's."""
        try:
            cell = Cell(**{**values, "at_steps": tuple(values["at_steps"])})
            names = [name for name in (cell.id, cell.trunk) if name is not None]
            plain = all(n not in ("", "..") and n == pathlib.PurePath(n).name for n in names)
        except (TypeError, KeyError):
            plain = False
        if not plain:
            raise UserError("plan.json: holds what is no cell; restore it, or use a new --workdir")
        return cell


def measure(setup: prepare.Setup, seconds: float | None) -> Rates:
    """What a step of a prepared run takes.

    Args:
      setup: the run.
      seconds: of a step, measured; None takes the plan's estimate.
    """
    plan, billing = prepare.plan_run(setup), setup.billing
    steps, spread = setup.config.train.steps, plan["range"]
    tokens = prepare.planned_tokens(setup) / steps
    each = lambda device_hours: device_hours * 3600 / billing.devices / steps
    params = plan["params"]
    return Rates(
        tokens=tokens,
        flops=tokens * billing.flops_per_token,
        seconds=seconds or each(plan["device_hours"]),
        seconds_low=seconds or each(spread["device_hours"]["low"]),
        seconds_high=seconds or each(spread["device_hours"]["high"]),
        devices=billing.devices,
        price=billing.price.dollars_per_hour,
        price_low=spread["price"]["low"],
        price_high=spread["price"]["high"],
        hardware=billing.hardware,
        measured=seconds is not None,
        model={
            "total": params["total"], "active": params["active"]["no_embedding"],
            "flops_per_token": billing.flops_per_token,
        },
        data=setup.dataset.fingerprint,
    )  # fmt: skip


def check_text(spec: AblationSpec, setups: Mapping[str, prepare.Setup]) -> None:
    """Variants have to be measured on the same held-out text, and losses in the same tokens.

    Raises:
      ConfigError: they are not.
    """
    first = setups[spec.reference].dataset
    for name, setup in setups.items():
        other = setup.dataset
        if other.validation_bytes != first.validation_bytes:
            raise ConfigError(
                f"variants.{name}: data", setup.config.data.shown,
                f"holds out {other.validation_bytes:,} bytes, the reference "
                f"{first.validation_bytes:,}; variants need the same held-out text",
            )  # fmt: skip
        if spec.metric != "val_bits_per_byte" and other.fingerprint != first.fingerprint:
            raise ConfigError(
                "metric", spec.metric,
                f"counts tokens, and those of {name!r} are not the reference's; use "
                "'val_bits_per_byte'",
            )  # fmt: skip


def equal_steps(variant: str, field: str, amount: float, hold: str, rates: Rates) -> int:
    """Steps of a variant that come to a budget.

    Raises:
      ConfigError: one step is more than that, or whole steps are not within 1 % of it.
    """
    each = rates.of(hold)
    steps = round(amount / each)
    unit = UNITS[hold]
    if each > amount:
        raise ConfigError(
            field, amount, f"{unit}: one step of {variant!r} takes {each:.6g}; give more, or a "
            "smaller train.batch_size",
        )  # fmt: skip
    off = steps * each / amount - 1
    if abs(off) > TOLERANCE:
        raise ConfigError(
            field, amount,
            f"{unit}: {steps} steps of {variant!r} differ from it by {100 * off:+.1f} %, so that "
            "budgets would not be equal; give more, or a smaller train.batch_size",
        )  # fmt: skip
    return steps


def make_cells(spec: AblationSpec, rates: Mapping[str, Rates]) -> list[Cell]:
    """All cells that are known before the tuning has found learning rates: tuning, then by seed.

    Raises:
      ConfigError: budgets that cannot be equal, a ladder that runs cannot share, a tuning that
        costs more than its share.
    """
    final = {
        name: _upcycled(spec, name, rates) if spec.upcycled(name)
        else _finals(spec, name, rates[name])
        for name in spec.variants
    }  # fmt: skip
    tuning = [cell for name in spec.variants for cell in _tuning(spec, name, rates[name], final)]
    by_seed = [c for seed in spec.seeds for cells in final.values() for c in cells
               if c.seed == seed]  # fmt: skip
    cells = [*tuning, *by_seed]
    twice = [name for name, n in collections.Counter(c.id for c in cells).items() if n > 1]
    check(not twice, "variants", list(spec.variants), f"two cells would be called {twice[:1]}; "
          "rename a variant")  # fmt: skip
    return cells


def own_learning_rate(spec: AblationSpec, variant: str) -> float:
    """The learning rate that a variant's config has."""
    return spec.run_config(variant).optim.learning_rate


def _finals(spec: AblationSpec, variant: str, rates: Rates) -> list[Cell]:
    """A variant's cells of the grid proper, for every seed: trunk first, then its branches."""
    budget = spec.budget
    steps = {
        amount: equal_steps(variant, f"budget.amounts[{i}]", amount, budget.hold, rates)
        for i, amount in enumerate(budget.amounts)
    }
    largest = budget.amounts[-1]
    if len(steps) == 1:
        starts = {}
    else:
        starts = {a: _start(spec, variant, n) for a, n in steps.items() if a != largest}
    rate = None if spec.tuning else own_learning_rate(spec, variant)
    cells = []
    for seed in spec.seeds:
        name = f"{variant}-seed{seed}"
        trunk = f"{name}-{largest:g}" if starts else name
        cell = lambda amount, id, kind, begin=0, **more: Cell(
            id, variant, seed, amount, kind, rate, steps[amount], steps[amount] * rates.tokens,  # noqa: B023
            steps[amount] * rates.flops, rates.bill(steps[amount] - begin), from_step=begin, **more,
        )  # fmt: skip
        at = tuple(sorted({start for start in starts.values() if start > 0}))
        cells.append(cell(largest, trunk, "trunk" if starts else "final", at_steps=at))
        for amount, start in starts.items():
            cells.append(cell(amount, f"{name}-{amount:g}", "branch", start, trunk=trunk))
    return cells


def dense_name(variant: str) -> str:
    """What the dense run of an upcycled variant is called among the rates."""
    return f"{variant}:dense"


def _upcycled(spec: AblationSpec, variant: str, rates: Mapping[str, Rates]) -> list[Cell]:
    """An upcycled variant's cells: for every seed the dense run, and what goes on from it.

    Both come to the budget together; what goes on counts all that led to it.
    """
    hold, (amount,) = spec.budget.hold, spec.budget.amounts
    dense, own = rates[dense_name(variant)], rates[variant]
    where = f"upcycle.{variant}.share"
    share = spec.upcycled(variant).share
    before = equal_steps(dense_name(variant), where, share * amount, hold, dense)
    spent = before * dense.of(hold)
    steps = equal_steps(variant, where, amount - spent, hold, own)
    cells = []
    for seed in spec.seeds:
        name = f"{variant}-seed{seed}"
        begins = Cell(
            f"{name}-dense", variant, seed, spent, "dense", spec.dense_config(variant).optim
            .learning_rate, before, before * dense.tokens, before * dense.flops, dense.bill(before),
        )  # fmt: skip
        goes_on = Cell(
            name, variant, seed, amount, "final", own_learning_rate(spec, variant), steps,
            begins.tokens + steps * own.tokens, begins.flops + steps * own.flops, own.bill(steps),
            from_step=before, trunk=begins.id,
        )  # fmt: skip
        cells += [begins, goes_on]
    return cells


def _start(spec: AblationSpec, variant: str, steps: int) -> int:
    """Where the branch of so many steps leaves the trunk."""
    try:
        return fork_step(_with_steps(spec.run_config(variant), steps))
    except ConfigError as error:
        where = f"variants.{variant}: {error.field}"
        raise ConfigError(
            where, error.value, f"{error.remedy} (budget.amounts is a ladder, of one trunk and its "
            "branches)",
        ) from None  # fmt: skip


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def _tuning(
    spec: AblationSpec, variant: str, rates: Rates, final: Mapping[str, Sequence[Cell]]
) -> list[Cell]:
    """A variant's tuning cells, as long as fits in its share."""
    tuning = spec.tuning
    if tuning is None:
        return []
    allowed = tuning_allowance(spec, final[variant]) * rates.of(spec.budget.hold)
    runs = len(tuning.factors) * len(tuning.seeds)
    amount = tuning.amount
    if amount is None:
        # Room for one more factor, should the best of the bracket lie at its edge.
        amount = min(spec.budget.amounts[0], allowed / (runs + len(tuning.seeds)))
    check(
        runs * amount <= allowed * (1 + TOLERANCE), "tuning.amount", amount,
        f"{runs} tuning runs of {variant!r} take {runs * amount:.4g} {UNITS[spec.budget.hold]}, "
        f"above tuning.max_share, which is {allowed:.4g}; give less, or fewer factors",
    )  # fmt: skip
    # Whole steps, rounded down: the tuning need not be equal, but stay within its share.
    steps = math.floor(amount / rates.of(spec.budget.hold) * (1 + 1e-9))
    warmup = spec.run_config(variant).optim.warmup_steps
    check(
        steps > warmup, "tuning.max_share", tuning.max_share,
        f"leaves {steps} steps for each of {runs} tuning runs of {variant!r}, which end in the "
        f"warm-up of {warmup}; give more, or fewer factors or seeds",
    )  # fmt: skip
    return [
        tuning_cell(spec, variant, rates, factor, seed, steps)
        for factor in sorted(tuning.factors) for seed in tuning.seeds
    ]  # fmt: skip


def tuning_allowance(spec: AblationSpec, finals: Sequence[Cell]) -> float:
    """Steps that a variant's tuning may take: its share of those that its runs really do."""
    return spec.tuning.max_share * sum(cell.own_steps for cell in finals)


def tuning_cell(
    spec: AblationSpec, variant: str, rates: Rates, factor: float, seed: int, steps: int
) -> Cell:
    """One tuning run."""
    return Cell(
        f"{variant}-tune-x{factor:g}-seed{seed}", variant, seed,
        steps * rates.of(spec.budget.hold), "tune", factor * own_learning_rate(spec, variant),
        steps, steps * rates.tokens, steps * rates.flops, rates.bill(steps), factor=factor,
    )  # fmt: skip


def cell_config(spec: AblationSpec, cell: Cell) -> RunConfig:
    """The run of a cell whose learning rate is known."""
    values = edited(spec.base, spec.variants[cell.variant])
    if cell.kind == "dense":
        edits = {**spec.variants[cell.variant], **spec.upcycled(cell.variant).edits}
        values = edited(spec.base, edits)
    settings = {
        "seed": cell.seed, "stage": "ablation", "train.steps": cell.steps, "cost.final": False,
        "optim.learning_rate": cell.learning_rate, "checkpoint.at_steps": list(cell.at_steps),
    }  # fmt: skip
    return run_config.from_dict(edited(values, settings))
