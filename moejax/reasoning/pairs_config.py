"""The configs of stages that train nothing: pairs by rule, rejection sampling, evaluation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax import config as mechanism
from moejax.config import ConfigError, check, check_positive
from moejax.cost.cost_config import BudgetConfig, CostConfig
from moejax.data import DataConfig
from moejax.models.sampling_config import SamplingConfig
from moejax.reasoning.policy_config import EvaluationConfig, PromptConfig
from moejax.reasoning.rewards import RewardConfig
from moejax.reasoning.tasks import TaskConfig
from moejax.training.run_config import StartConfig

KINDS = ("pairs", "rejection", "evaluation")


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Pairs of prompt and worked answer, made by rule (block ``pairs``).

    Attributes:
      count: how many; a small task brings the same problem again.
      solutions: with the tasks' own chains of thought; False has completions without any, for a
        template that does not think.
      text: also write them as documents, prompt and completion in one, to ``text.jsonl``: task text
        for pre-training, by data.source ``text``.
    """

    count: int = 10_000
    solutions: bool = True
    text: bool = False

    def __post_init__(self) -> None:
        check_positive("pairs", self, "count")


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
    """A model's own answers, of which those that are right are kept (block ``rejection``).

    DeepSeek-R1's second round of supervised data was made so (arXiv 2501.12948, section 2.3.3).

    Attributes:
      questions: how many are asked.
      samples: answers to each.
      keep: right answers kept of a question, at most, the shortest first; equal ones count once.
      batch: answers sampled at once.
      reward: least reward of an answer that is kept.
      preferences: also write ``preferences.jsonl``, for direct preference optimization: of every
        question with right and wrong answers, those kept, each with a wrong one, the longest first.
    """

    questions: int = 1_000
    samples: int = 4
    keep: int = 1
    batch: int = 256
    reward: float = 1.0
    preferences: bool = False

    def __post_init__(self) -> None:
        check_positive("rejection", self, "questions", "samples", "keep", "batch")


@dataclasses.dataclass(frozen=True)
class ShortConfig:
    """A stage of one of KINDS.

    Attributes:
      start: the run whose model answers; none for pairs by rule.
      prompt_tokens: longest prompt.
      others: as in a run of reinforcement.
    """

    start: StartConfig = StartConfig()
    task: TaskConfig = TaskConfig()
    prompt: PromptConfig = PromptConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    pairs: PairsConfig | None = None
    rejection: RejectionConfig | None = None
    evaluation: EvaluationConfig | None = None
    data: DataConfig = DataConfig()
    budget: BudgetConfig = BudgetConfig()
    cost: CostConfig = CostConfig()
    prompt_tokens: int = 128
    seed: int = 0
    stage: str = ""

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**32, "seed", self.seed, "must be from 0 to below 2**32")
        check_positive("", self, "prompt_tokens")
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        check(len(given) == 1, "stage", given, f"has to have one block of {', '.join(KINDS)}")
        if self.kind != "pairs":
            check(
                bool(self.start.run), "start.run", self.start.run,
                f"the stage {self.kind!r} asks a trained model; give the folder of its run",
            )  # fmt: skip

    @property
    def kind(self) -> str:
        """Which of KINDS."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready blocks, as a config file writes them."""
        return mechanism.to_dict(self)


def from_dict(values: Mapping[str, Any]) -> ShortConfig:
    """Builds the config from the blocks of a config file.

    Raises:
      ConfigError: an unknown field, a wrong type or value, or fields that do not go together.
    """
    stages = {"pairs": "sft", "rejection": "rl_rollout", "evaluation": "eval"}
    kind = next((kind for kind in KINDS if kind in values), "")
    return mechanism.build(ShortConfig, {"stage": stages.get(kind, ""), **values})


__all__ = ["KINDS", "ConfigError", "PairsConfig", "RejectionConfig", "ShortConfig", "from_dict"]
