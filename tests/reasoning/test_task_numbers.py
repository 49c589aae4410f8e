"""The bounded grammar of numbers and expressions, against Python's own reading of them."""

import ast
import re
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.reasoning.tasks import TASKS
from moejax.reasoning.tasks.draws import Draws
from moejax.reasoning.tasks.numbers import DEEPEST, LONGEST_EXPRESSION, expression, number

symbols = st.text(alphabet="0123456789+-*/() ", max_size=24)


def by_python(text):
    """(value, numbers) of an expression that Python reads, without its // and ** and unary plus."""
    if "//" in text.replace(" ", "") or re.search(r"\*\s*\*", text):
        return None
    try:
        tree = ast.parse(re.sub(r"(?<![0-9])0+(?=[0-9])", "", text.strip()), mode="eval").body
    except SyntaxError:
        return None
    numbers = []

    def value(node):
        match node:
            case ast.Constant(int(found)):
                numbers.append(found)
                return Fraction(found)
            case ast.UnaryOp(ast.USub(), inner):
                return -value(inner)
            case ast.BinOp(left, operation, right):
                a, b = value(left), value(right)
                return {
                    ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b,
                    ast.Div: lambda: a / b,
                }[type(operation)]()  # fmt: skip
        raise SyntaxError

    try:
        return value(tree), tuple(numbers)
    except (SyntaxError, ZeroDivisionError):
        return None


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's on `1(2)`
@settings(max_examples=400, deadline=None)
@given(symbols)
def test_expressions_are_read_as_python_reads_them(text):
    assert expression(text) == by_python(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_chains_are_read_back(seed, level):
    problem = TASKS["chain"].problem(seed, 0, level, "train")
    assert str(expression(problem.prompt.removesuffix("="))[0]) == problem.answer


@pytest.mark.parametrize(
    "text",
    ["99**99**99", "9**9", "2^3", "1e9", "__import__('os')", "a", "1_000", "0x10", "", "()", "1 2",
     "1//2", "+1", "٣+٤", "1+", "*1", "1,2", "abs(1)", "1/0", "1/(2-2)", "\n1", "1\t+2", "½",
     "(" * (DEEPEST + 1) + "1" + ")" * (DEEPEST + 1), "-" * 200 + "1", "(" * 500],
)  # fmt: skip
def test_no_expression(text):
    assert expression(text) is None


def test_expressions_at_their_bounds():
    deep = "(" * DEEPEST + "1" + ")" * DEEPEST
    assert expression(deep) == (1, (1,))
    longest = "*".join(["9" * 100] * 5)
    assert expression(longest)[0] == int("9" * 100) ** 5
    assert expression("1" * LONGEST_EXPRESSION) is not None
    assert expression("1" * (LONGEST_EXPRESSION + 1)) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("-7", -7), ("+7", 7), ("007", 7), ("1,234,567", 1234567), ("-1,234.50", "-1234.5"),
     ("3/4", "3/4"), ("-6/8", "-3/4"), ("0.125", "1/8"), ("0", 0), ("-0", 0)],
)  # fmt: skip
def test_numbers(text, value):
    assert number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", "-", "--1", "1,23", ",123", "1234,567", "1.", ".5", "1/0", "1/2/3", "1.5/2", "1e5", "٣",
     "\uff13", "²", "½", "nan", "inf", "0x1", "1_0", " 1", "1 ", "1\n", "9" * 401, "9" * 10_000],
)  # fmt: skip
def test_no_number(text):
    assert number(text) is None


def test_long_numbers_never_reach_pythons_limit():
    limit = sys.get_int_max_str_digits()
    assert 0 < LONGEST_EXPRESSION < limit
    assert number("9" * 400) == 10**400 - 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(-50, 50), st.integers(0, 10**30))
def test_draws_lie_within_their_bounds(seed, low, span):
    draws = Draws("test", seed)
    found = [draws.integer(low, low + span) for _ in range(20)]
    assert all(low <= value <= low + span for value in found)
    again = Draws("test", seed)
    assert found == [again.integer(low, low + span) for _ in range(20)]


def test_draws_are_even():
    draws = Draws("even")
    counts = [0] * 10
    for _ in range(10_000):
        counts[draws.integer(0, 9)] += 1
    # chi-square with 9 degrees of freedom exceeds 27.9 once in a thousand; the draws are fixed
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 27.9
    assert sorted(draws.shuffled(range(50))) == list(range(50))
    keys = (("a", 1), ("a1",), ("a", "1"))
    assert len({Draws(*key).integer(0, 2**60) for key in keys}) == 3
    with pytest.raises(ValueError, match=r"no integer lies in \[3, 2\]"):
        draws.integer(3, 2)
