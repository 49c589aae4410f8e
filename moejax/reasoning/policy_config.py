"""The config of a run of reinforcement learning: a run's blocks, and those of the stage."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moejax import config as mechanism
from moejax.config import ConfigError, check, check_not_negative, check_positive
from moejax.models.sampling_config import SamplingConfig
from moejax.reasoning import templates
from moejax.reasoning.rewards import RewardConfig
from moejax.reasoning.rl_config import RLConfig
from moejax.reasoning.tasks import TaskConfig
from moejax.training import run_config
from moejax.training.run_config import STAGE_BLOCKS, RunConfig


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How questions are asked (block ``prompt``).

    Attributes:
      template: a name of ``moejax.reasoning.templates.TEMPLATES``.
    """

    template: str = "r1_short"

    def __post_init__(self) -> None:
        known = templates.TEMPLATES
        remedy = f"no such template; {mechanism.nearest(self.template, known)}"
        check(self.template in known, "prompt.template", self.template, remedy)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is asked of the policy besides its training (block ``evaluation``).

    The problems are all different, and held out: no seed brings one of them into training.

    Attributes:
      problems: how many.
      samples: answers to each, for pass@1 as their mean, and majority@samples.
      ks: of pass@k.
      every: steps between evaluations; 0 evaluates before the first step and after the last only.
      split: ``validation`` or ``test``.
      temperature: of the answers; 0 takes the likeliest token.
      seed: of the problems and of the answers.
    """

    problems: int = 200
    samples: int = 4
    ks: tuple[int, ...] = (1,)
    every: int = 0
    split: str = "validation"
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("evaluation", self, "problems", "samples")
        check_not_negative("evaluation", self, "every", "temperature", "seed")
        good = self.split in ("validation", "test")
        check(good, "evaluation.split", self.split, "must be 'validation' or 'test'")
        for k in self.ks:
            remedy = f"must be from 1 to evaluation.samples = {self.samples}"
            check(1 <= k <= self.samples, "evaluation.ks", k, remedy)


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A run of reinforcement learning on verifiable rewards.

    Of the block ``train``: ``steps`` is the number of rollouts, ``batch_size`` the responses of
    one, ``seq_len`` the longest prompt and response together, and ``micro_batches`` the parts that
    an optimizer step's gradients are accumulated over. A rollout is trained on in
    ``rl.epochs`` times ``rl.minibatches`` optimizer steps.

    Attributes:
      run: the blocks that every run has; ``run.start`` names the run whose model is trained on.
      task: what is asked.
      prompt: how it is asked.
      sampling: how long answers may be.
      rl: the algorithm.
      reward: what an answer is worth.
      evaluation: held-out problems.
    """

    run: RunConfig
    task: TaskConfig = TaskConfig()
    prompt: PromptConfig = PromptConfig()
    sampling: SamplingConfig = SamplingConfig()
    rl: RLConfig = RLConfig()
    reward: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        rl, run, train = self.rl.resolved(), self.run, self.run.train
        check(
            bool(run.start.run), "start.run", run.start.run,
            "reinforcement goes on from a trained model; give the folder of its run",
        )  # fmt: skip
        check(
            train.batch_size % rl.group_size == 0, "train.batch_size", train.batch_size,
            f"is not whole groups of rl.group_size = {rl.group_size}; choose a multiple",
        )  # fmt: skip
        check(
            train.batch_size % rl.minibatches == 0, "rl.minibatches", rl.minibatches,
            f"does not divide train.batch_size = {train.batch_size}; choose a divisor",
        )  # fmt: skip
        rows = train.batch_size // rl.minibatches
        check(
            rows % train.micro_batches == 0, "train.micro_batches", train.micro_batches,
            f"does not divide the {rows} responses of an optimizer step; choose a divisor",
        )  # fmt: skip
        check(
            train.seq_len > self.sampling.max_tokens, "train.seq_len", train.seq_len,
            f"has no room for a prompt beside sampling.max_tokens = {self.sampling.max_tokens}",
        )  # fmt: skip
        for name in ("distill", "preferences"):
            check(
                getattr(run, name) is None, name, "...",
                "is an objective of training on text or pairs; reinforcement has its own: leave it "
                "out",
            )  # fmt: skip
        for name, whole in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            value = getattr(self.sampling, name)
            check(
                value == whole, f"sampling.{name}", value,
                f"cuts the policy's distribution, which its loss knows nothing of; set {whole}",
            )  # fmt: skip
        check(
            self.sampling.temperature in (1.0, rl.temperature), "sampling.temperature",
            self.sampling.temperature, f"is not rl.temperature = {rl.temperature}; leave it out",
        )  # fmt: skip
        check(
            run.guard.action == "stop" and not run.guard.spike, "guard", "rewind or spike",
            "looks at losses of text; reinforcement stops at what is not finite, so leave it out",
        )  # fmt: skip

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt, in tokens, P."""
        return self.run.train.seq_len - self.sampling.max_tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready blocks, as a config file writes them."""
        return self.run.to_dict() | {
            name: mechanism.to_dict(getattr(self, name)) for name in STAGE_BLOCKS
        }


_CLASSES = {f.name: f.type for f in dataclasses.fields(PolicyConfig) if f.name != "run"}


def from_dict(values: Mapping[str, Any]) -> PolicyConfig:
    """Builds the config from the blocks of a config file.

    Raises:
      ConfigError: an unknown field, a wrong type or value, or fields that do not go together.
    """
    own = {name: values[name] for name in STAGE_BLOCKS if name in values}
    rest = {name: value for name, value in values.items() if name not in own}
    for name, value in own.items():
        check(isinstance(value, Mapping), name, value, "must be a block of fields")
    run = run_config.from_dict({"stage": "rl_train", **rest})
    blocks = {name: mechanism.build(_CLASSES[name], own[name], name) for name in own}
    return PolicyConfig(run, **blocks)


def load(path: str, overrides: Sequence[str]) -> PolicyConfig:
    """Reads a config file with command-line overrides; see ``moejax.config.load``."""
    return from_dict(mechanism.load(path, list(overrides)))


__all__ = [
    "STAGE_BLOCKS", "ConfigError", "EvaluationConfig", "PolicyConfig", "PromptConfig", "from_dict",
    "load",
]  # fmt: skip
