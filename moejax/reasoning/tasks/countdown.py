"""Countdown: make a target from numbers. Any correct expression counts."""

import collections

from moejax.reasoning.tasks.chains import Node, join, leaf, text
from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.numbers import expression
from moejax.reasoning.tasks.task import Instance, Problem, RuleTask

LARGEST = 999


class Countdown(RuleTask):
    """Level d: d + 2 numbers of 1 to 25, each to be used at most once.

    The target is made from all of the numbers, so that it can be reached; a shorter way may exist,
    and counts as well. An answer is an expression alone, without an equals sign.
    """

    name, most_difficult = "countdown", 6
    characters = "0123456789+-*/=(), ;.Makefromlt"

    def make(self, draws: Draws, difficulty: int) -> Instance:
        while True:
            numbers = [draws.integer(1, 25) for _ in range(difficulty + 2)]
            made = _made(draws, numbers)
            if made is not None and int(made[0].value) not in numbers:
                break
        node, steps = made
        target = int(node.value)
        listed = " ".join(map(str, numbers))
        key = f"{target} from {' '.join(map(str, sorted(numbers)))}"
        solution = "; ".join([*steps, f"{text(node)}={target}"])
        given = (target, *numbers)
        return Instance(f"Make {target} from {listed}.", text(node), solution, key, given)

    def _right(self, problem: Problem, answer: str) -> bool:
        found = expression(answer)
        if found is None:
            return False
        value, used = found
        target, *numbers = problem.given
        allowed, spent = collections.Counter(numbers), collections.Counter(used)
        return value == target and all(spent[n] <= allowed[n] for n in spent)

    def _vote(self, answer: str) -> str | None:
        return None if expression(answer) is None else answer.replace(" ", "")


def _made(draws: Draws, numbers: list[int]) -> tuple[Node, list[str]] | None:
    """Joins two of the nodes until one is left: (expression, worked steps); None on a dead end.

    Every result is a whole number from 1 to LARGEST.
    """
    nodes, steps = [leaf(n) for n in numbers], []
    while len(nodes) > 1:
        nodes = draws.shuffled(nodes)
        left, right = nodes.pop(), nodes.pop()
        operation = draws.choice("+-*/")
        if operation in "-/" and left.value < right.value:
            left, right = right, left
        if operation == "/" and left.value % right.value:
            operation = "+"
        node = join(operation, left, right)
        if not 1 <= node.value <= LARGEST:
            return None
        nodes.append(node)
        step = f"{left.value}{operation}{right.value}={node.value}"
        rest = " ".join(str(other.value) for other in nodes)
        steps.append(f"{step}, left {rest}")
    return nodes[0], steps
