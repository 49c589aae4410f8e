"""Tasks of the package reasoning-gym, where it is installed: ``gym:NAME``.

Only tasks with a single right answer are taken: those that keep the package's own comparison with
one oracle. The rest bring scorers of their own, some of which hand a model's text to ``eval`` or
to SymPy's parser, and nothing that a model wrote is executed here.
"""

from typing import Any

from moejax.config import ConfigError, UserError, check, nearest
from moejax.reasoning.tasks.datasets import TextAnswers, plain
from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.task import MOST_TRIES, SPLITS, Problem, check_split, split_of

PREFIX = "gym:"
FIELD = "task.names"


def _package() -> Any:
    try:
        import reasoning_gym  # optional, and slow to import
        import reasoning_gym.factory
    except Exception as error:  # not installed, or one of its many dependencies is not
        raise UserError(
            f"tasks named {PREFIX}NAME need the package reasoning-gym ({type(error).__name__}: "
            f"{str(error)[:120]}); pip install reasoning-gym (needs a C compiler)"
        ) from error
    return reasoning_gym


class GymTask(TextAnswers):
    """One task of reasoning-gym at its default settings, which are level 0.

    The question decides the split. Equal (seed, index) give equal problems with one version of the
    package.

    Args:
      name: ``gym:NAME``.

    Raises:
      UserError: the package is not installed.
      ConfigError: no such task in it, or one with several right answers.
    """

    characters = ""  # not known beforehand

    def __init__(self, name: str):
        self.name, own = name, name.removeprefix(PREFIX)
        self._gym = _package()
        known = self._gym.factory.DATASETS
        check(own in known, FIELD, name, f"no such task in reasoning-gym; {nearest(own, known)}")
        base = self._gym.factory.ProceduralDataset.score_answer
        single = {task for task, (made, _) in known.items() if made.score_answer is base}
        if own not in single:
            remedy = "has answers that only its own code can judge, which is not run here; "
            raise ConfigError(FIELD, name, f"{remedy}take one of {', '.join(sorted(single))}")
        self._own = own

    def check_difficulty(self, difficulty: int, split: str) -> None:
        check(difficulty == 0, "task.difficulty", difficulty, f"{self.name} has only level 0")

    def problem(self, seed: int, index: int, difficulty: int, split: str) -> Problem:
        check_split(split)
        self.check_difficulty(difficulty, split)
        draws = Draws(self.name, seed, index, split)
        for _ in range(MOST_TRIES):
            made = self._gym.create_dataset(self._own, seed=draws.integer(0, 2**31 - 1), size=1)[0]
            question, answer = str(made["question"]).strip(), str(made["answer"]).strip()
            key = plain(question)
            if answer and split_of(self.name, key) == SPLITS[split]:
                return Problem(self.name, question, answer, 0, split, "", key)
        raise UserError(f"task {self.name!r} has no instance in split {split!r}; take another task")
