"""The config of a run: every room's own dataclass, composed and checked against one another."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moejax import config as mechanism
from moejax.config import ConfigError, check, check_not_negative, check_positive
from moejax.cost.cost_config import BudgetConfig, CostConfig
from moejax.data import DataConfig
from moejax.models import ModelConfig
from moejax.moe import MoEConfig, router_options
from moejax.parallel import MeshConfig
from moejax.training.checkpoints import CheckpointConfig
from moejax.training.distillation import DistillConfig
from moejax.training.guard import GuardConfig
from moejax.training.optimizers import OptimConfig
from moejax.training.preferences import PreferenceConfig
from moejax.training.schedules import MTPWeight


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of the training loop (block ``train``).

    Attributes:
      steps: optimizer steps.
      batch_size: rows of one step, over all devices and micro-batches.
      seq_len: positions of a row, S.
      micro_batches: parts of a batch whose gradients are accumulated.
      log_every: steps between logged lines.
      eval_every: steps between validations; 0 validates at the end only.
      eval_batches: validation batches in a validation during the run; 0 means all. The last
        validation always takes all.
      mtp_weight: weight of the loss of MTP modules, the mean over modules (``model.mtp_depth``);
        the default and those below are DeepSeek-V3's (arXiv 2412.19437, section 4.2).
      mtp_weight_final: its weight towards the end.
      mtp_switch: share of the steps after which the final weight applies.
      sample_prompt: how the text sampled at the end begins.
      sample_tokens: tokens of that text; 0 samples none.
    """

    steps: int
    batch_size: int = 16
    seq_len: int = 256
    micro_batches: int = 1
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 8
    mtp_weight: float = 0.3
    mtp_weight_final: float = 0.1
    mtp_switch: float = 10.0 / 14.8
    sample_prompt: str = ""
    sample_tokens: int = 0

    def __post_init__(self) -> None:
        check_positive(
            "train", self, "steps", "batch_size", "seq_len", "micro_batches", "log_every"
        )
        check_not_negative(
            "train", self, "eval_every", "eval_batches", "sample_tokens", "mtp_weight",
            "mtp_weight_final", "mtp_switch",
        )  # fmt: skip
        # Schedules count in 32 bits.
        check(self.steps < 2**31, "train.steps", self.steps, "must be below 2**31")
        check(self.mtp_switch <= 1, "train.mtp_switch", self.mtp_switch, "must be from 0 to 1")
        check(
            self.batch_size % self.micro_batches == 0, "train.micro_batches", self.micro_batches,
            f"does not divide train.batch_size = {self.batch_size}; choose a divisor",
        )  # fmt: skip

    @property
    def mtp_schedule(self) -> MTPWeight:
        """The weight of the MTP modules' loss by step."""
        switch = round(self.mtp_switch * self.steps)
        return MTPWeight.of(self.mtp_weight, self.mtp_weight_final, switch)


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Weights to start from (block ``start``): another run's parameters and routers' state.

    The optimizer begins anew, and so do steps, tokens and the order of the data. A resumed run goes
    on from its own checkpoints; preferences look at this model as their reference to the end.

    Attributes:
      run: the other run's folder; "" starts from the seed.
      step: of its checkpoint; 0 takes the one of the lowest validation loss, or the newest where
        none was validated.
    """

    run: str = ""
    step: int = 0

    def __post_init__(self) -> None:
        check_not_negative("start", self, "step")
        check(
            bool(self.run) or not self.step, "start.step", self.step,
            "names no checkpoint without start.run; give the folder of a run",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run. ``model.moe`` holds the blocks ``moe`` and ``router``.

    Attributes:
      seed: of the initial weights and of the order of the data.
      stage: what the run is part of, for the ledger: ``pretrain``, ``sft``, ``rl_rollout``,
        ``rl_train``, ``distill``, ``eval``, or a name of one's own.
      distill: a teacher whose distributions are learned, in place of the text's next tokens.
      preferences: direct preference optimization, on the rows of data.source ``preferences``; the
        reference is what the run starts from.
    """

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    budget: BudgetConfig = BudgetConfig()
    cost: CostConfig = CostConfig()
    guard: GuardConfig = GuardConfig()
    start: StartConfig = StartConfig()
    distill: DistillConfig | None = None
    preferences: PreferenceConfig | None = None
    seed: int = 0
    stage: str = "pretrain"

    def __post_init__(self) -> None:
        self._check_objective()
        # grain and jax would take a larger seed for a smaller one without a word.
        check(0 <= self.seed < 2**32, "seed", self.seed, "must be from 0 to below 2**32")
        kept = self.checkpoint
        check(
            self.guard.action == "stop" or not kept.every_steps or kept.keep_newest > 1,
            "checkpoint.keep_newest", kept.keep_newest, "is too few for guard.action = 'rewind': "
            "the newest checkpoint may be what is bad; keep at least 2",
        )  # fmt: skip

    def _check_objective(self) -> None:
        """Raises ConfigError where what is minimised does not go with the rest."""
        source, wanted = self.data.source, self.preferences is not None
        check(
            wanted == (source == "preferences"), "data.source", source,
            "is not 'preferences', which the block preferences learns from; set it"
            if wanted else "holds pairs of responses, which the block preferences learns from; add "
            "the block",
        )  # fmt: skip
        if wanted:
            check(
                self.preferences.reference_free or bool(self.start.run), "start.run",
                self.start.run, "preferences are learned against the model that the run starts "
                "from; give its folder, or set preferences.reference_free",
            )  # fmt: skip
            check(
                self.distill is None, "distill", "...", "is another objective than preferences; "
                "leave one of them out",
            )  # fmt: skip
        other = wanted or self.distill is not None
        check(
            not other or not self.model.mtp_depth, "model.mtp_depth", self.model.mtp_depth,
            "has modules that neither distillation nor preferences train; set 0",
        )  # fmt: skip
        if self.distill is not None:
            check(
                bool(self.distill.run), "distill.run", self.distill.run,
                "names no teacher; give the folder of its run",
            )  # fmt: skip

    @property
    def looks_at(self) -> str | None:
        """The block that names the second model of the run's objective; None without one."""
        if self.distill is not None:
            return "distill"
        with_reference = self.preferences is not None and not self.preferences.reference_free
        return "start" if with_reference else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready blocks, as a config file writes them: ``moe`` and ``router`` on their own."""
        blocks = mechanism.to_dict(self)
        for name in ("distill", "preferences"):
            if blocks[name] is None:
                del blocks[name]
        moe = blocks["model"].pop("moe")
        if moe is not None:
            blocks["router"] = moe.pop("router")
            blocks["moe"] = moe
        return blocks


# Blocks of stages of reasoning (``moejax.reasoning``), which say nothing of the model.
STAGE_BLOCKS = ("task", "prompt", "sampling", "rl", "reward", "evaluation")
# Blocks that a config of training on text never has.
OTHER_STAGES = ("rl", "pairs", "rejection", "evaluation", "pipeline")

# Blocks and fields that a resumed run may change: what is spent, kept and shown, and where it runs.
MAY_CHANGE = (
    "budget", "checkpoint", "cost", "guard", "mesh", "train.log_every", "train.eval_every",
    "train.eval_batches", "train.sample_prompt", "train.sample_tokens", "data.prefetch",
    "data.cache_dir", "moe.exchange", "moe.devices_per_node",
)  # fmt: skip


def from_dict(values: Mapping[str, Any], *, own: bool = True) -> RunConfig:
    """Builds a run's config from the blocks of a config file.

    Args:
      values: the blocks.
      own: they are the user's own; those of a run's record are not: see ``run_dir.recorded``.

    Raises:
      ConfigError: an unknown field, a wrong type or value, or fields that do not go together.
    """
    check(isinstance(values, Mapping), "config", values, "must be blocks of fields")
    values = dict(values)
    moe_values, router_values = values.pop("moe", None), values.pop("router", None)
    check(
        moe_values is not None or router_values is None, "router", router_values,
        "needs the block moe beside it; add one, or remove the router",
    )  # fmt: skip
    known = {f.name for f in dataclasses.fields(RunConfig)} | {"moe", "router"}
    for name in values:
        if name in OTHER_STAGES:
            raise ConfigError(
                name, "...", "makes the config a stage that moejax train alone can run; plans and "
                "ablations are for training on text",
            )  # fmt: skip
        if name not in known:
            raise ConfigError(
                name, values[name], f"no such block; {mechanism.nearest(name, known)}"
            )
    check("model" in values, "model", None, "has no default; add the block to the config")
    check("train" in values, "train", None, "has no default; add the block to the config")
    model_values = values["model"]
    check(isinstance(model_values, Mapping), "model", model_values, "must be a block of fields")
    if moe_values is not None:
        check(isinstance(moe_values, Mapping), "moe", moe_values, "must be a block of fields")
        check("router" not in moe_values, "moe.router", "...", "is a block of its own: router")
        router_values = {} if router_values is None else router_values
        check(isinstance(router_values, Mapping), "router", router_values, "must be a block")
        router = router_options(router_values, own=own)
        moe = mechanism.build(MoEConfig, {**moe_values, "router": router}, "moe")
        model_values = {**model_values, "moe": moe}
    return mechanism.build(RunConfig, {**values, "model": model_values})


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: Sequence[str] = MAY_CHANGE
) -> list[str]:
    """Fields that differ between two resolved configs and may not change on a resume.

    Args:
      old: the config that was recorded.
      new: the config that is asked for.
      may_change: fields, or blocks of them, that are left out.

    Returns:
      Lines such as ``optim.learning_rate (0.001 -> 0.002)``.
    """
    before, after = flat(old), flat(new)
    lines = []
    for name in sorted(before.keys() | after.keys()):
        free = any(name == field or name.startswith(field + ".") for field in may_change)
        if not free and before.get(name) != after.get(name):
            lines.append(f"{name} ({before.get(name)!r} -> {after.get(name)!r})")
    return lines


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level: dotted field to value."""
    fields = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def load(path: str, overrides: list[str]) -> RunConfig:
    """Reads a config file with command-line overrides; see ``moejax.config.load``."""
    return from_dict(mechanism.load(path, overrides))


__all__ = [
    "MAY_CHANGE",
    "ConfigError",
    "RunConfig",
    "StartConfig",
    "TrainConfig",
    "differences",
    "from_dict",
    "load",
]
