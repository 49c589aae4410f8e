"""Boolean expressions, worked an operation at a time."""

from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.task import Instance, Problem, RuleTask

# A bool, ("not", tree), or ("and" | "or", tree, tree).
Tree = bool | tuple
STRENGTH = {"or": 1, "and": 2, "not": 3}


def random_tree(draws: Draws, leaves: int) -> Tree:
    """A random expression of so many literals."""
    if leaves == 1:
        value = draws.chance(50)
        return ("not", value) if draws.chance(40) else value
    cut = draws.integer(1, leaves - 1)
    parts = random_tree(draws, cut), random_tree(draws, leaves - cut)
    tree = (draws.choice(("and", "or")), *parts)
    return ("not", tree) if draws.chance(15) else tree


def truth(tree: Tree) -> bool:
    """The value of an expression."""
    if isinstance(tree, bool):
        return tree
    operation, *parts = tree
    if operation == "not":
        return not truth(parts[0])
    values = [truth(part) for part in parts]
    return all(values) if operation == "and" else any(values)


def show(tree: Tree, outer: int = 0) -> str:
    """An expression in Python's words, with the fewest parentheses."""
    if isinstance(tree, bool):
        return str(tree)
    operation, *parts = tree
    level = STRENGTH[operation]
    if operation == "not":
        return f"not {show(parts[0], level)}"
    inside = f" {operation} ".join(show(part, level) for part in parts)
    return f"({inside})" if level < outer else inside


def reduced(tree: Tree) -> Tree:
    """The expression with its first innermost operation worked out."""
    operation, *parts = tree
    if all(isinstance(part, bool) for part in parts):
        return truth(tree)
    first = next(i for i, part in enumerate(parts) if not isinstance(part, bool))
    parts[first] = reduced(parts[first])
    return (operation, *parts)


def canonical(tree: Tree) -> str:
    """A form that the order and grouping of an ``and`` or an ``or`` do not change."""
    if isinstance(tree, bool):
        return str(tree)
    operation, *parts = tree
    return f"{operation}[{','.join(sorted(canonical(p) for p in _flat(operation, parts)))}]"


def _flat(operation: str, parts: list[Tree]) -> list[Tree]:
    found = []
    for part in parts:
        same = operation != "not" and not isinstance(part, bool) and part[0] == operation
        found += _flat(operation, list(part[1:])) if same else [part]
    return found


class Boolean(RuleTask):
    """Level d: d + 2 literals joined by ``and`` and ``or``, some negated, in parentheses."""

    name, most_difficult = "boolean", 10
    characters = "TrueFalsndot ()="

    def make(self, draws: Draws, difficulty: int) -> Instance:
        tree = random_tree(draws, difficulty + 2)
        steps, answer, key = [show(tree)], str(truth(tree)), canonical(tree)
        while not isinstance(tree, bool):
            tree = reduced(tree)
            steps.append(show(tree))
        return Instance(f"{steps[0]} =", answer, " = ".join(steps), key)

    def _right(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer

    def _vote(self, answer: str) -> str | None:
        return answer if answer in ("True", "False") else None
