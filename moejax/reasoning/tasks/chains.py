"""Chains of operations: expressions with precedence and parentheses, worked a step at a time."""

import dataclasses
from fractions import Fraction

from moejax.reasoning.tasks.arithmetic import NumberTask
from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.task import Instance

LARGEST = 9_999  # absolute value of any intermediate result
STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclasses.dataclass(frozen=True)
class Node:
    """A number (``operation`` is "") or an operation on two nodes, with its exact value."""

    value: Fraction
    operation: str = ""
    left: "Node | None" = None
    right: "Node | None" = None


def leaf(value: int | Fraction) -> Node:
    return Node(Fraction(value))


def join(operation: str, left: Node, right: Node) -> Node:
    """The operation on two nodes.

    Raises:
      ZeroDivisionError: division by zero.
    """
    a, b = left.value, right.value
    value = a + b if operation == "+" else a - b if operation == "-" else a * b
    if operation == "/":
        value = a / b
    return Node(value, operation, left, right)


def text(node: Node, outer: str = "", right: bool = False) -> str:
    """An expression with the fewest parentheses; a negative number in it has its own."""
    if not node.operation:
        bare = str(node.value)
        return f"({bare})" if outer and node.value < 0 else bare
    operation = node.operation
    inside = f"{text(node.left, operation)}{operation}{text(node.right, operation, True)}"
    weaker = outer and STRENGTH[operation] < STRENGTH[outer]
    # a-(b+c), a/(b*c) and a*(b/c) need theirs; a+(b-c) does not.
    same = right and outer and STRENGTH[operation] == STRENGTH[outer] and outer != "+"
    return f"({inside})" if weaker or same else inside


def reduced(node: Node) -> Node:
    """The expression with its first innermost operation worked out."""
    if not (node.left.operation or node.right.operation):
        return leaf(node.value)
    if node.left.operation:
        return Node(node.value, node.operation, reduced(node.left), node.right)
    return Node(node.value, node.operation, node.left, reduced(node.right))


def worked(node: Node) -> str:
    """``2+3*(4-1)=2+3*3=2+9=11``."""
    steps = [text(node)]
    while node.operation:
        node = reduced(node)
        steps.append(text(node))
    return "=".join(steps)


def canonical(node: Node) -> str:
    """A form in which sums and products that differ in order or grouping are equal."""
    if not node.operation:
        return str(node.value)
    level = STRENGTH[node.operation]
    return f"{'+' if level == 1 else '*'}[{','.join(sorted(_terms(node, level, False)))}]"


def _terms(node: Node, level: int, inverse: bool) -> list[str]:
    """The signed terms of a sum (level 1), or the factors and divisors of a product (level 2)."""
    if not node.operation or STRENGTH[node.operation] != level:
        return [("~" if inverse else "") + canonical(node)]
    turned = inverse != (node.operation in "-/")
    return _terms(node.left, level, inverse) + _terms(node.right, level, turned)


class Chain(NumberTask):
    """Level d: d + 2 numbers; exact division from level 3 on."""

    name, most_difficult = "chain", 12
    characters = "0123456789+-*/=()"

    def make(self, draws: Draws, difficulty: int) -> Instance:
        node = None
        while node is None:
            node = _tree(draws, difficulty + 2, difficulty >= 3)
        return Instance(f"{text(node)}=", str(node.value), worked(node), canonical(node))


def _tree(draws: Draws, leaves: int, divide: bool) -> Node | None:
    """A random expression whose every value is a whole number up to LARGEST; None if it is not."""
    if leaves == 1:
        return leaf(draws.integer(1, 20))
    cut = draws.integer(1, leaves - 1)
    left, right = _tree(draws, cut, divide), _tree(draws, leaves - cut, divide)
    if left is None or right is None:
        return None
    operation = draws.choice("+-*/" if divide else "+-*")
    if operation == "/" and (not right.value or left.value % right.value):
        operation = "-"
    node = join(operation, left, right)
    return node if abs(node.value) <= LARGEST else None
