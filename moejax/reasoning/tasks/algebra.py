"""Linear equations in x."""

from fractions import Fraction

from moejax.reasoning.tasks.arithmetic import NumberTask
from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.task import Instance, Problem


def side(slope: int, constant: int) -> str:
    """``3x-4``, ``-x``, ``7``."""
    x = {0: "", 1: "x", -1: "-x"}.get(slope, f"{slope}x")
    if not x:
        return str(constant)
    return x + (f"{constant:+d}" if constant else "")


def worked(a: int, b: int, c: int, d: int) -> list[str]:
    """ax+b=cx+d, with x brought to the left, numbers to the right, and a division."""
    steps = [f"{side(a, b)}={side(c, d)}"]
    moved = side(-c, 0) if c else ""
    if moved and not moved.startswith("-"):
        moved = f"+{moved}"
    steps.append(f"{side(a, 0)}{moved}={d}{f'{-b:+d}' if b else ''}")
    slope, right = a - c, d - b
    steps.append(f"{side(slope, 0)}={right}")
    if slope != 1:
        steps.append(f"x={right}/{slope if slope > 0 else f'({slope})'}")
        steps.append(f"x={Fraction(right, slope)}")
    return list(dict.fromkeys(steps))


class Linear(NumberTask):
    """Solve for x. Levels: x+b=c, ax+b=c, ax+b=cx+d, a(x+b)=cx+d; 5 and 6: 3 and 4 with fractions.

    The unordered pair of the two sides, multiplied out, decides the split. ``x=5`` and ``5`` are
    the same answer.
    """

    name, most_difficult = "algebra", 6
    characters = "0123456789+-=/();xSolvefr. "

    def make(self, draws: Draws, difficulty: int) -> Instance:
        a, b, c, d = self._coefficients(draws, difficulty)
        left, steps = side(a, b), []
        if difficulty in (4, 6):
            offset = draws.integer(1, 9) * draws.choice((1, -1))
            b, d = a * offset, d - b + a * offset  # x stays
            left = f"{a}({side(1, offset)})"
            steps.append(f"{left}={side(c, d)}")
        steps += worked(a, b, c, d)
        key = "=".join(sorted([f"{a}x{b:+d}", f"{c}x{d:+d}"]))
        answer = str(Fraction(d - b, a - c))
        prompt = f"Solve {left}={side(c, d)} for x."
        return Instance(prompt, answer, "; ".join(steps), key, (a, b, c, d))

    def _coefficients(self, draws: Draws, difficulty: int) -> tuple[int, int, int, int]:
        """(a, b, c, d) of ax+b=cx+d, with one solution: a whole one below level 5."""
        a = 1 if difficulty == 1 else draws.integer(2, 12)
        c = 0
        while difficulty >= 3 and c in (0, a):
            c = draws.integer(-9, 12)
        b = draws.integer(-30, 30)
        if difficulty < 5:
            return a, b, c, (a - c) * draws.integer(-20, 20) + b
        return a, b, c, draws.integer(-30, 30)

    def _right(self, problem: Problem, answer: str) -> bool:
        return super()._right(problem, _bare(answer))

    def _vote(self, answer: str) -> str | None:
        return super()._vote(_bare(answer))


def _bare(answer: str) -> str:
    """The answer without a leading ``x=``."""
    name, equals, value = answer.partition("=")
    return value.strip(" ") if equals and name.strip(" ") == "x" else answer
