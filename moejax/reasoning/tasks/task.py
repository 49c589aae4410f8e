"""What a task is, and which of its instances are held out.

**Splits.** The canonical form of an instance (the unordered pair of operands of an addition, the
sorted items of a list to sort) decides by its hash whether it belongs to ``train``, ``validation``
or ``test``, and a split's generator draws again until it meets one of its own. So no seed, no
index and no level of difficulty can bring a held-out instance into training. ``sft`` and ``rl`` are
streams of their own over the instances of ``train``. What this does not exclude: a step *inside* a
worked solution, such as a sum of two partial products, may be a held-out instance of another task.
"""

import abc
import dataclasses
from typing import ClassVar

from moejax.config import UserError, check, nearest
from moejax.reasoning.tasks.draws import Draws, fraction_of

# A stream's name, and the split that its instances belong to.
SPLITS = {
    "train": "train", "sft": "train", "rl": "train", "validation": "validation", "test": "test",
}  # fmt: skip
HELD_OUT = 0.1  # share of the instances in `validation`, and again in `test`
MOST_TRIES = 20_000  # draws until one is of the wanted split; 1 in 10 is
LONGEST_ANSWER = 512  # characters of an answer that are looked at, where the right one is short


@dataclasses.dataclass(frozen=True)
class Problem:
    """One instance of a task.

    Attributes:
      task: name of the task that verifies it.
      prompt: the question, without any template.
      answer: a right answer.
      difficulty: the task's level; 0 where a dataset does not say.
      split: the stream that it was drawn for: a key of ``SPLITS``.
      solution: a correct chain of thought by rule; "" where there is none.
      key: canonical form; equal keys are one instance and lie in one split.
      given: integers that the verifier needs, such as countdown's target and numbers.
    """

    task: str
    prompt: str
    answer: str
    difficulty: int
    split: str
    solution: str = ""
    key: str = ""
    given: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Instance:
    """What a rule makes; ``Task.problem`` adds the name, the level and the split."""

    prompt: str
    answer: str
    solution: str
    key: str
    given: tuple[int, ...] = ()


def split_of(task: str, key: str) -> str:
    """'train', 'validation' or 'test': where the instance of this canonical form belongs."""
    place = fraction_of(task, key)
    return "test" if place < HELD_OUT else "validation" if place < 2 * HELD_OUT else "train"


def check_split(split: str) -> None:
    """Raises ConfigError for a name that is no stream of problems."""
    check(split in SPLITS, "task.split", split, f"no such split; {nearest(split, SPLITS)}")


class Task(abc.ABC):
    """Problems and the judge of their answers."""

    name: str
    characters: str  # what prompts, solutions and answers may hold, as far as known beforehand

    @abc.abstractmethod
    def problem(self, seed: int, index: int, difficulty: int, split: str) -> Problem:
        """The problem of this place in a stream: a pure function of its arguments.

        Args:
          seed: of the stream.
          index: place in it, from 0.
          difficulty: a level that ``check_difficulty`` accepts.
          split: a key of ``SPLITS``.

        Raises:
          ConfigError: no such split or level.
        """

    @abc.abstractmethod
    def check_difficulty(self, difficulty: int, split: str) -> None:
        """Raises ConfigError for a level that the task, or a split of it, does not have."""

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether an answer is right; False for one that cannot be read. Never raises.

        No more than a bounded piece of text is looked at: a much longer answer is wrong.
        """
        if len(answer) > max(LONGEST_ANSWER, 2 * len(problem.answer)):
            return False
        return self._right(problem, answer.strip(" \t\r\n"))

    @abc.abstractmethod
    def _right(self, problem: Problem, answer: str) -> bool:
        """``verify`` of stripped text of bounded length."""

    def canonical(self, problem: Problem, answer: str) -> str | None:
        """A form that equal answers share, for votes; None for one that cannot be read."""
        if len(answer) > max(LONGEST_ANSWER, 2 * len(problem.answer)):
            return None
        return self._vote(answer.strip(" \t\r\n")) or None

    def _vote(self, answer: str) -> str | None:
        return answer


class RuleTask(Task):
    """A task whose instances a rule makes, at levels 1 to ``most_difficult``."""

    most_difficult: ClassVar[int]

    @abc.abstractmethod
    def make(self, draws: Draws, difficulty: int) -> Instance:
        """One instance, of any split."""

    def problem(self, seed: int, index: int, difficulty: int, split: str) -> Problem:
        check_split(split)
        self.check_difficulty(difficulty, split)
        draws = Draws(self.name, seed, index, difficulty, split)
        for _ in range(MOST_TRIES):
            made = self.make(draws, difficulty)
            if split_of(self.name, made.key) == SPLITS[split]:
                return Problem(
                    self.name, made.prompt, made.answer, difficulty, split, made.solution,
                    made.key, made.given,
                )  # fmt: skip
        raise UserError(
            f"task {self.name!r} has no instance of level {difficulty} in split {split!r}; take a "
            "higher level"
        )

    def check_difficulty(self, difficulty: int, split: str = "train") -> None:
        known = type(difficulty) is int and 1 <= difficulty <= self.most_difficult
        remedy = f"task {self.name!r} has the levels 1 to {self.most_difficult}; take one of them"
        check(known, "task.difficulty", difficulty, remedy)
