"""The block ``task`` of a config, and the problems that it means."""

import dataclasses

from moejax.config import UserError, check, nearest
from moejax.reasoning.tasks import gym
from moejax.reasoning.tasks.algebra import Linear
from moejax.reasoning.tasks.arithmetic import Addition, Multiplication, Subtraction
from moejax.reasoning.tasks.boolean import Boolean
from moejax.reasoning.tasks.chains import Chain
from moejax.reasoning.tasks.countdown import Countdown
from moejax.reasoning.tasks.datasets import gsm8k, jsonl
from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.knights import Knights
from moejax.reasoning.tasks.lists import Copy, Sort
from moejax.reasoning.tasks.task import Problem, RuleTask, Task, check_split

_RULES = (
    Addition, Subtraction, Multiplication, Chain, Countdown, Linear, Sort, Copy, Boolean, Knights,
)  # fmt: skip
TASKS: dict[str, RuleTask] = {task.name: task() for task in _RULES}
DATASETS = ("gsm8k", "jsonl")
MISSES = 20


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What to ask.

    Raises:
      ConfigError: a field that cannot be used; files are looked at when the tasks are opened.
    """

    # Of TASKS, 'gsm8k', 'jsonl', or 'gym:NAME'; several are asked in equal parts.
    names: tuple[str, ...] = ("add",)
    difficulties: tuple[int, ...] = (2,)  # levels of tasks by rule, in equal parts; data goes whole
    path: str = ""  # the .jsonl file, or tfds' data_dir for gsm8k
    download: bool = False  # let tfds fetch gsm8k

    def __post_init__(self):
        for field in ("names", "difficulties"):
            values = getattr(self, field)
            good = len(values) > 0 and len(set(values)) == len(values)
            check(good, f"task.{field}", list(values), "must be at least one, and none twice")
        for name in self.names:
            known = name in TASKS or name in DATASETS or name.startswith(gym.PREFIX)
            hint = nearest(name, [*TASKS, *DATASETS])
            check(known, "task.names", name, f"no such task; {hint}, or {gym.PREFIX}NAME")
            for level in self.difficulties if name in TASKS else ():
                TASKS[name].check_difficulty(level)
        needs = "jsonl" in self.names and not self.path
        check(not needs, "task.path", self.path, "'jsonl' reads a file; give its path")
        both = all(name in self.names for name in DATASETS)
        check(not both, "task.names", list(self.names), "gsm8k and jsonl share task.path; take one")


class TaskSet:
    """Opened tasks: streams of problems, and the judge of their answers.

    Raises:
      UserError: data that cannot be read, or a package that is not installed.
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.tasks: dict[str, Task] = {name: _open(name, config) for name in config.names}
        self._cells = [
            (name, level)
            for name in config.names
            for level in (config.difficulties if name in TASKS else (0,))
        ]

    @property
    def characters(self) -> str:
        """What prompts, solutions and answers may hold, as far as it is known beforehand."""
        return "".join(sorted({c for task in self.tasks.values() for c in task.characters}))

    def problem(self, seed: int, index: int, split: str) -> Problem:
        """The problem of this place in a stream: a pure function of its arguments."""
        name = Draws("task", seed, index, split).choice(self.config.names)
        levels = [level for task, level in self._cells if task == name]
        level = Draws("level", seed, index, split).choice(levels)
        return self.tasks[name].problem(seed, index, level, split)

    def distinct(self, count: int, split: str, seed: int = 0) -> list[Problem]:
        """So many different problems, as many of each task and level as the count allows.

        For evaluation: a problem that came twice would count twice, and narrow the interval.

        Raises:
          UserError: a task has not so many different problems.
        """
        check_split(split)
        found: list[Problem] = []
        for place, (name, level) in enumerate(self._cells):
            share = count // len(self._cells) + (place < count % len(self._cells))
            found += self._different(name, level, share, split, seed)
        return found

    def _different(self, name: str, level: int, count: int, split: str, seed: int) -> list[Problem]:
        by_key: dict[str, Problem] = {}
        index = last = 0  # draws, and how many there were at the last new one
        # If one were left of n, 20 n draws would miss it with a chance of e^-20.
        while index - last <= MISSES * (len(by_key) + 5):
            if len(by_key) == count:
                return list(by_key.values())
            problem = self.tasks[name].problem(seed, index, level, split)
            index += 1
            if problem.key not in by_key:
                by_key[problem.key], last = problem, index
        raise UserError(
            f"task {name!r} has about {len(by_key)} different problems of level {level} in split "
            f"{split!r}, not {count}; ask for fewer, or take a higher level"
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether an answer is right; see ``Task.verify``."""
        return self.tasks[problem.task].verify(problem, answer)

    def canonical(self, problem: Problem, answer: str) -> str | None:
        """The form of an answer that votes are counted by; see ``Task.canonical``."""
        return self.tasks[problem.task].canonical(problem, answer)


def _open(name: str, config: TaskConfig) -> Task:
    if name in TASKS:
        return TASKS[name]
    if name == "gsm8k":
        return gsm8k(config.path, config.download)
    return jsonl(config.path) if name == "jsonl" else gym.GymTask(name)
