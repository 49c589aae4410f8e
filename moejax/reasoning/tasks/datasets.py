"""Tasks read from data: GSM8K by tensorflow-datasets, and a user's own JSONL.

Held out is what the data set holds out itself; where it does not say, the hash of the question
decides, as for tasks by rule. An answer is right if it is the same number, or else the same text up
to runs of white space.
"""

import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from moejax.config import ConfigError, check
from moejax.data import tfds_source
from moejax.data.data_config import DataConfig
from moejax.data.documents import field_of
from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.numbers import number, number_text
from moejax.reasoning.tasks.task import SPLITS, Problem, Task, check_split, split_of

QUESTIONS = ("prompt", "question")  # fields of a record, the first that is there
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's annotations


def plain(text: str) -> str:
    """Text with every run of white space as one space."""
    return " ".join(text.split())


class TextAnswers(Task):
    """A task whose answer is a number or a text, and which has no rule to judge by."""

    def _right(self, problem: Problem, answer: str) -> bool:
        return bool(answer) and self._vote(answer) == self._vote(problem.answer)

    def _vote(self, answer: str) -> str | None:
        value = number(answer)
        return plain(answer) if value is None else number_text(value)


class DatasetTask(TextAnswers):
    """Problems from a list. A stream goes through all of them, in a new order each time.

    Args:
      name: of the task.
      problems: with the split that each belongs to: train, validation or test.
    """

    def __init__(self, name: str, problems: Sequence[Problem]):
        self.name = name
        self._by_split = {
            split: [p for p in problems if p.split == split] for split in sorted({*SPLITS.values()})
        }
        self._order = functools.lru_cache(maxsize=16)(self._shuffled)

    @functools.cached_property
    def characters(self) -> str:
        """Every character of the prompts, solutions and answers."""
        found: set[str] = set()
        for problem in (p for some in self._by_split.values() for p in some):
            found.update(problem.prompt, problem.answer, problem.solution)
        return "".join(sorted(found))

    def count(self, split: str, difficulty: int = 0) -> int:
        """How many problems a split has, of one level or (0) of all."""
        check_split(split)
        some = self._by_split[SPLITS[split]]
        return sum(difficulty in (0, p.difficulty) for p in some)

    def check_difficulty(self, difficulty: int, split: str) -> None:
        if self.count(split):
            remedy = f"no problem of {self.name!r} in split {split!r} has that level; 0 takes all"
            check(self.count(split, difficulty) > 0, "task.difficulty", difficulty, remedy)
        remedy = f"data set {self.name!r} has no problem in it; give the lines a `split`, or more"
        check(self.count(split) > 0, "task.split", split, f"{remedy} lines")

    def problem(self, seed: int, index: int, difficulty: int, split: str) -> Problem:
        self.check_difficulty(difficulty, split)
        order = self._order(seed, index // self.count(split, difficulty), difficulty, split)
        row = order[index % len(order)]
        return Problem(
            self.name, row.prompt, row.answer, row.difficulty, split, row.solution, row.key
        )

    def _shuffled(self, seed: int, epoch: int, difficulty: int, split: str) -> list[Problem]:
        rows = [p for p in self._by_split[SPLITS[split]] if difficulty in (0, p.difficulty)]
        return Draws(self.name, seed, epoch, difficulty, split).shuffled(rows)


def gsm8k(path: str = "", download: bool = False) -> DatasetTask:
    """Grade-school mathematics (Cobbe et al. 2021, arXiv 2110.14168), MIT licence.

    The level is the number of calculations in the solution. ``test`` is the data set's own;
    ``validation`` is held out of its ``train`` by hash, and a question of ``test`` is never in
    ``train``.

    Args:
      path: tfds data_dir; "" for tfds' own default.
      download: whether tfds may fetch it.

    Raises:
      ConfigError: it is not there and may not or cannot be fetched, or holds no answers.
    """
    config = DataConfig(source="tfds", name="gsm8k", path=path, download=download)
    found: dict[str, Problem] = {}
    try:
        for own in ("test", "train"):
            for i, record in enumerate(tfds_source.read_split(config, own)):
                problem = _gsm8k_problem(record, own, f"gsm8k/{own}:{i}")
                found.setdefault(problem.key, problem)
    except ConfigError as error:
        field = {"data.name": "task.names"}.get(error.field, error.field.replace("data.", "task."))
        remedy = error.remedy.replace("data.", "task.")
        raise ConfigError(field, error.value, remedy) from error
    return DatasetTask("gsm8k", list(found.values()))


def _gsm8k_problem(record: dict[str, Any], own: str, name: str) -> Problem:
    question, text = (field_of(record, field, name) for field in ("question", "answer"))
    solution, mark, answer = text.rpartition("####")
    good = mark and number(answer.strip()) is not None
    check(bool(good), "task.names", name, "has no answer after ####; the data set is damaged")
    key, level = plain(question), len(_CALCULATOR.findall(solution))
    if own == "train" and split_of("gsm8k", key) == "validation":
        own = "validation"
    worked = _CALCULATOR.sub("", solution).strip()
    return Problem("gsm8k", question.strip(), answer.strip(), level, own, worked, key)


def jsonl(path: str) -> DatasetTask:
    """A user's own questions: one JSON object a line.

    Fields: ``prompt`` or ``question``, ``answer`` (text or a number), and optionally ``solution``,
    ``difficulty`` (a whole number) and ``split`` (train, validation or test). A question that
    stands there twice is taken once.

    Raises:
      ConfigError: no such file, a bad line (its number is named), or no answers in it.
    """
    file = pathlib.Path(path).expanduser()
    check(file.is_file(), "task.path", path, "no such file; give a .jsonl file of questions")
    found: dict[str, tuple[Problem, str]] = {}
    questions = 0
    unanswered = ""
    for where, record in _lines(file):
        questions += 1
        if record.get("answer") is None:
            unanswered = unanswered or where
            continue
        problem = _own_problem(record, where)
        first, line = found.setdefault(problem.key, (problem, where))
        same = (first.answer, first.split) == (problem.answer, problem.split)
        remedy = f"asks what {line} asks, with another answer or in another split; keep one of them"
        check(same, "task.path", where, remedy)
    check(bool(questions), "task.path", path, "holds no lines; put questions in it")
    check(bool(found), "task.path", path, "holds no answers; give every line an `answer` field")
    check(not unanswered, "task.path", unanswered, "has no `answer`; add one, or drop the line")
    return DatasetTask("jsonl", [problem for problem, _ in found.values()])


def _lines(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every line that is not blank."""
    with file.open("rb") as stream:
        for number_of_line, line in enumerate(stream, start=1):
            where = f"{file}:{number_of_line}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError("task.path", where, "is not a line of JSON; mend it") from error
            check(isinstance(record, dict), "task.path", where, "is not a JSON object; mend it")
            yield where, record


def _own_problem(record: dict[str, Any], where: str) -> Problem:
    field = next((name for name in QUESTIONS if name in record), None)
    check(field is not None, "task.path", where, "has no `prompt` or `question`; add one")
    question = _text(record[field], field, where)
    answer = _text(record["answer"], "answer", where)
    solution = _text(record["solution"], "solution", where) if record.get("solution") else ""
    level, key = record.get("difficulty", 0), plain(question)
    good = type(level) is int and level >= 0
    check(good, "task.path", where, "its `difficulty` is not a whole number from 0; mend it")
    split = record.get("split", split_of("jsonl", key))
    known = isinstance(split, str) and split in set(SPLITS.values())
    check(known, "task.path", where, "its `split` is none of train, validation, test; mend it")
    return Problem("jsonl", question, answer, level, split, solution, key)


def _text(value: Any, field: str, where: str) -> str:
    """A field's text, stripped; a number as it is written."""
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        value = repr(value)
    good = isinstance(value, str) and bool(value.strip())
    check(good, "task.path", where, f"its `{field}` is no text or number; mend it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        raise ConfigError("task.path", where, f"its `{field}` is not Unicode; mend it") from error
    return value.strip()
