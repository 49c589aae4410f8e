"""Addition, subtraction and multiplication of numbers of so many digits, by columns."""

from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.numbers import number, number_text
from moejax.reasoning.tasks.task import Instance, Problem, RuleTask


class NumberTask(RuleTask):
    """A task whose answer is one number, in any of the spellings that ``numbers.number`` reads."""

    def _right(self, problem: Problem, answer: str) -> bool:
        value = number(answer)
        return value is not None and value == number(problem.answer)

    def _vote(self, answer: str) -> str | None:
        value = number(answer)
        return None if value is None else number_text(value)


class _Columns(NumberTask):
    """Two operands of as many digits as the level; the unordered pair decides the split."""

    most_difficult = 50
    sign: str

    def make(self, draws: Draws, difficulty: int) -> Instance:
        low = 10 ** (difficulty - 1) if difficulty > 1 else 0
        a, b = (draws.integer(low, 10**difficulty - 1) for _ in range(2))
        answer, solution = self.solve(a, b)
        key = f"{min(a, b)}{self.sign}{max(a, b)}"
        return Instance(f"{a}{self.sign}{b}=", str(answer), solution, key, (a, b))

    def solve(self, a: int, b: int) -> tuple[int, str]:
        """(answer, worked solution)."""
        raise NotImplementedError


class Addition(_Columns):
    """Level d: two numbers of d digits."""

    name, sign = "add", "+"
    characters = "0123456789+=; c"

    def solve(self, a: int, b: int) -> tuple[int, str]:
        total, steps = add_steps(a, b)
        if len(steps) > 1:
            steps.append(f"{a}+{b}={total}")
        return total, "; ".join(steps)


class Subtraction(_Columns):
    """Level d: two numbers of d digits; the answer may be negative."""

    name, sign = "subtract", "-"
    characters = "0123456789-=; b<()"

    def solve(self, a: int, b: int) -> tuple[int, str]:
        high, low = max(a, b), min(a, b)
        steps = [f"{a}<{b}", f"{a}-{b}=-({b}-{a})"] if a < b else []
        steps += subtract_steps(high, low)
        if high > 9:
            steps.append(f"{high}-{low}={high - low}")
        if a < b:
            steps.append(f"{a}-{b}={a - b}")
        return a - b, "; ".join(steps)


class Multiplication(_Columns):
    """Level d: two numbers of d digits, by partial products."""

    name, sign = "multiply", "*"
    characters = "0123456789*+=; "

    def solve(self, a: int, b: int) -> tuple[int, str]:
        parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(b)))]
        parts = [part for part in parts if part] or [0]
        steps, total = [], 0
        for place, part in enumerate(parts):
            steps.append(f"{a}*{part}={a * part}")
            if place:
                steps.append(f"{total}+{a * part}={total + a * part}")
            total += a * part
        if len(parts) > 1 or parts[0] != b:
            steps.append(f"{a}*{b}={total}")
        return total, "; ".join(steps)


def _digits(value: int, width: int) -> list[int]:
    """Decimal digits, the ones first."""
    return [value // 10**place % 10 for place in range(width)]


def add_steps(a: int, b: int) -> tuple[int, list[str]]:
    """Columns from the right: ``5+7=12 c1`` carries one, and ``4+6+1=11 c1`` has received one."""
    width = max(len(str(a)), len(str(b)))
    carry, total, steps = 0, 0, []
    for place, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        column = x + y + carry
        carries = column > 9 and place + 1 < width
        steps.append(f"{x}+{y}{'+1' if carry else ''}={column}{' c1' if carries else ''}")
        carry, total = column // 10, total + column % 10 * 10**place
    return total + carry * 10**width, steps


def subtract_steps(a: int, b: int) -> list[str]:
    """Columns from the right for a >= b: ``12-7=5 b1`` borrows ten from the next column."""
    width, borrowed, steps = len(str(a)), 0, []
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        column = x - y - borrowed
        borrow = column < 0
        less = "-1" if borrowed else ""
        steps.append(f"{x + 10 * borrow}-{y}{less}={column + 10 * borrow}{' b1' * borrow}")
        borrowed = int(borrow)
    return steps
