"""Sorting numbers and copying letters: what a model can do without knowing anything."""

import string

from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.task import Instance, Problem, RuleTask


class Sort(RuleTask):
    """Level d: d + 2 numbers of up to two digits, upwards or downwards.

    The multiset of the numbers decides the split, whatever their order and the direction. An answer
    lists the numbers, parted by spaces or commas.
    """

    name, most_difficult = "sort", 18
    characters = "0123456789 ;:,.Sortupdwnlefak"

    def make(self, draws: Draws, difficulty: int) -> Instance:
        numbers = [draws.integer(0, 99) for _ in range(difficulty + 2)]
        down = draws.chance(50)
        ordered = sorted(numbers, reverse=down)
        steps = []
        left = list(numbers)
        for number in ordered[:-1]:
            left.remove(number)
            steps.append(f"take {number}, left {_spaced(left)}")
        prompt = f"Sort {'down' if down else 'up'}: {_spaced(numbers)}."
        key = _spaced(sorted(numbers))
        return Instance(prompt, _spaced(ordered), "; ".join(steps), key, tuple(ordered))

    def _right(self, problem: Problem, answer: str) -> bool:
        return self._vote(answer) == problem.answer

    def _vote(self, answer: str) -> str | None:
        items = answer.replace(", ", ",").replace(" ", ",").split(",")
        plain = all(len(item) <= 2 and item.isascii() and item.isdigit() for item in items)
        return _spaced(map(int, items)) if plain else None


def _spaced(items) -> str:
    return " ".join(map(str, items))


class Copy(RuleTask):
    """Level d: a word of d + 2 lower-case letters, to be repeated."""

    name, most_difficult = "copy", 60
    characters = string.ascii_lowercase + "C: "

    def make(self, draws: Draws, difficulty: int) -> Instance:
        word = "".join(draws.choice(string.ascii_lowercase) for _ in range(difficulty + 2))
        return Instance(f"Copy: {word}", word, " ".join(word), word)

    def _right(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer
