"""Rewards by rule: a right answer, the right form, a fit length; or a function of the user's own.

A completion is read by the template's strict form, and its answer by the task's bounded grammar.
Nothing that a model wrote is ever executed, and the time is linear in its length. A completion that
breaks the form is worth nothing, whatever its answer.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Literal

from moejax.config import (
    ConfigError,
    UserError,
    check,
    check_not_negative,
    check_positive,
    import_module,
)
from moejax.reasoning.tasks import Problem
from moejax.reasoning.templates import Parsed, Template

# (problem, completion without its prompt) -> a finite number
OwnReward = Callable[[Problem, str], float]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The block ``reward``: what a completion is worth.

    Raises:
      ConfigError: a field that cannot be used.
    """

    accuracy: float = 1.0  # of a right answer in the right form
    format: float = 0.1  # of the right form
    length: float = 0.0  # weight of the length rule
    # band: 0 from `shortest` to `longest` tokens, falling to -1 over `slack` tokens beyond.
    # group: among a question's samples, +0.5 for the shortest down to -0.5 for the longest; a wrong
    #   one gets no more than 0 (Kimi k1.5, arXiv 2501.12599, section 2.3.3).
    length_rule: Literal["none", "band", "group"] = "none"
    shortest: int = 0
    longest: int = 0
    slack: int = 1
    # "package.module:function" of (problem, completion), in the place of accuracy's 0 or 1
    function: str = ""

    def __post_init__(self):
        check_not_negative("reward", self, "accuracy", "format", "length", "shortest", "longest")
        check_positive("reward", self, "slack")
        if self.length_rule == "band":
            remedy = f"must not be below reward.shortest = {self.shortest}"
            check(self.longest >= self.shortest, "reward.longest", self.longest, remedy)
        none = self.length == 0 and self.length_rule != "none"
        check(not none, "reward.length", self.length, "the length rule needs a weight above zero")


@dataclasses.dataclass(frozen=True)
class Reward:
    """What one completion is worth, and why.

    Attributes:
      total: the weighted sum, for the optimizer.
      accuracy: 1 for a right answer in the right form, else 0.
      format: 1 for the right form, else 0.
      length: of the length rule, unweighted.
      parsed: the blocks that were read, or the fault.
      own: value of the user's own function; None without one.
    """

    total: float
    accuracy: float
    format: float
    length: float
    parsed: Parsed
    own: float | None = None


class Scorer:
    """Rewards of one config.

    Args:
      config: the block ``reward``.
      template: how completions are read.
      verify: (problem, answer's text) -> whether it is right; such as ``Task.verify``.

    Raises:
      ConfigError: the user's own function cannot be loaded.
    """

    def __init__(
        self, config: RewardConfig, template: Template, verify: Callable[[Problem, str], bool]
    ):
        self.config, self._template, self._verify = config, template, verify
        self._own = load_function(config.function) if config.function else None

    def group(
        self, problem: Problem, completions: Sequence[str], lengths: Sequence[int] | None = None
    ) -> list[Reward]:
        """Rewards of one question's samples.

        Args:
          problem: the question.
          completions: the model's continuations, without prompt and stop token.
          lengths: their tokens; characters where they are not given.

        Raises:
          UserError: the user's own function raised, or returned no finite number.
        """
        if lengths is None:
            lengths = [len(text) for text in completions]
        found = [self._judged(problem, text) for text in completions]
        rule = {"none": _no_rule, "band": _band, "group": _shorter}[self.config.length_rule]
        fits = rule(self.config, lengths, [accuracy for _, accuracy, _ in found])
        return [self._reward(*each, fit) for each, fit in zip(found, fits, strict=True)]

    def score(self, problem: Problem, completion: str, length: int | None = None) -> Reward:
        """``group`` of a single sample."""
        return self.group(problem, [completion], None if length is None else [length])[0]

    def _judged(self, problem: Problem, text: str) -> tuple[Parsed, float, float | None]:
        parsed = self._template.parse(text)
        right = parsed.answer is not None and self._verify(problem, parsed.answer)
        own = None
        if self._own is not None:
            own = _own_value(self._own, self.config.function, problem, text)
        return parsed, float(right), own

    def _reward(self, parsed: Parsed, right: float, own: float | None, fit: float) -> Reward:
        config, formed = self.config, float(not parsed.fault)
        value = right if own is None else own
        total = config.accuracy * value + config.format * formed + config.length * fit
        return Reward(total, right, formed, fit, parsed, own)


def _no_rule(config: RewardConfig, lengths: Sequence[int], right: Sequence[float]) -> list[float]:
    return [0.0] * len(lengths)


def _band(config: RewardConfig, lengths: Sequence[int], right: Sequence[float]) -> list[float]:
    outside = [max(config.shortest - n, n - config.longest, 0) for n in lengths]
    return [-min(1.0, n / config.slack) for n in outside]


def _shorter(config: RewardConfig, lengths: Sequence[int], right: Sequence[float]) -> list[float]:
    low, high = min(lengths, default=0), max(lengths, default=0)
    if low == high:
        return [0.0] * len(lengths)
    places = [0.5 - (n - low) / (high - low) for n in lengths]
    return [place if r else min(0.0, place) for place, r in zip(places, right, strict=True)]


def load_function(path: str) -> OwnReward:
    """The user's own reward function.

    Args:
      path: ``package.module:function``, on the Python path or in the working directory.

    Raises:
      ConfigError: no such module or function, or importing it raised.
    """
    field = "reward.function"
    module, colon, name = path.partition(":")
    check(bool(module and colon and name), field, path, "write it as package.module:function")
    try:
        function = getattr(import_module(module), name, None)
    except Exception as error:  # the user's own file may raise anything
        raise ConfigError(
            field, path, f"importing {module} raised {type(error).__name__}: {error}; mend it, or "
            "put its folder on the Python path"
        ) from error  # fmt: skip
    check(callable(function), field, path, f"{module} has no function {name}; name one that it has")
    return function


def _own_value(function: OwnReward, path: str, problem: Problem, text: str) -> float:
    where = f"reward.function = {path!r}: on the problem {problem.prompt[:80]!r} it"
    try:
        value = function(problem, text)
    except Exception as error:  # the user's own function may raise anything
        raise UserError(
            f"{where} raised {type(error).__name__}: {str(error)[:200]}; mend it"
        ) from error
    number = isinstance(value, numbers.Real) and not isinstance(value, complex)
    if not number or not math.isfinite(value):
        raise UserError(f"{where} returned {str(value)[:80]}; return a finite number")
    return float(value)
