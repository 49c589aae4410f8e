"""Numbers and expressions read from untrusted text, exactly and in bounded time.

The grammar is the whole of what is accepted: ASCII digits, the four operations and parentheses.
There is no power, no name and no call, so that nothing grows beyond the digits that were written,
and nothing is ever evaluated by Python.
"""

import re
from fractions import Fraction

MOST_DIGITS = 400  # of one number; far below the 4,300 where int() refuses
LONGEST_EXPRESSION = 512
DEEPEST = 32  # parentheses and signs within each other

_NUMBER = re.compile(
    r"([+-]?)(?:([0-9]{1,3}(?:,[0-9]{3})+)|([0-9]+))(?:\.([0-9]+))?(?:/([0-9]+))?", re.ASCII
)


def number(text: str) -> Fraction | None:
    """An integer, decimal or fraction such as ``-1,234``, ``0.5`` or ``3/4``; None for all else."""
    if len(text) > MOST_DIGITS:
        return None
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    sign, grouped, plain, decimals, divisor = found.groups()
    if (divisor and decimals) or (divisor and not int(divisor)):
        return None
    whole = (grouped or plain).replace(",", "")
    value = Fraction(int(whole + (decimals or "")), 10 ** len(decimals or ""))
    value /= int(divisor or 1)
    return -value if sign == "-" else value


def number_text(value: Fraction | int) -> str:
    """``7``, ``-7`` or ``-7/2``."""
    return str(value)


class _Unreadable(Exception):
    """The text is not of the grammar, or divides by zero."""


class _Parser:
    """Recursive descent: sum = product (+|- product)*, product = factor (*|/ factor)*."""

    def __init__(self, text: str):
        self.text, self.at, self.used = text, 0, []

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else ""

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while (operation := self.peek()) and operation in "+-":
            self.at += 1
            other = self.product(depth)
            value = value + other if operation == "+" else value - other
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while (operation := self.peek()) and operation in "*/":
            self.at += 1
            other = self.factor(depth)
            if operation == "/" and not other:
                raise _Unreadable
            value = value * other if operation == "*" else value / other
        return value

    def factor(self, depth: int) -> Fraction:
        mark = self.peek()
        if depth > DEEPEST or not mark:
            raise _Unreadable
        if mark == "-":
            self.at += 1
            return -self.factor(depth + 1)
        if mark == "(":
            self.at += 1
            value = self.sum(depth + 1)
            if self.peek() != ")":
                raise _Unreadable
            self.at += 1
            return value
        start = self.at
        while self.at < len(self.text) and self.text[self.at] in "0123456789":
            self.at += 1
        if self.at == start:
            raise _Unreadable
        value = int(self.text[start : self.at])
        self.used.append(value)
        return Fraction(value)


def expression(text: str) -> tuple[Fraction, tuple[int, ...]] | None:
    """The exact value of an expression and the numbers in it, as written; None for all else.

    Args:
      text: integers, ``+ - * /``, a minus sign before a factor, parentheses and spaces.
    """
    if len(text) > LONGEST_EXPRESSION:
        return None
    parser = _Parser(text)
    try:
        value = parser.sum(0)
    except _Unreadable:
        return None
    return (value, tuple(parser.used)) if not parser.peek() else None
