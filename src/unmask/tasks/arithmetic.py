"""Arithmetic expressions over whole numbers: a small grammar, exact values, and no evaluator of Python.

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "/") factor }
    factor  = "-" factor | "+" factor | number | "(" sum ")"
    number  = 1 to 6 ASCII digits

Text is bounded before it is looked at, so that every answer of a policy, however odd, takes microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

MAX_CHARACTERS = 200
MAX_DEPTH = 30

_TOKEN = re.compile(r"\s*([0-9]{1,6}(?![0-9])|[-+*/()])")  # no alternative can match what another has begun


@dataclass(frozen=True)
class Expression:
    """What an expression comes to, and the literals in it, in their order."""

    value: Fraction
    numbers: tuple[int, ...]


class _Reader:
    """Recursive descent over tokens; None where the text is no expression."""

    def __init__(self, tokens: Sequence[str]):
        self.tokens, self.place, self.depth = tokens, 0, 0
        self.numbers: list[int] = []

    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self) -> Fraction | None:
        value = self.product()
        while value is not None and self.next() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            other = self.product()
            value = None if other is None else value + sign * other
        return value

    def product(self) -> Fraction | None:
        value = self.factor()
        while value is not None and self.next() in ("*", "/"):
            is_division = self.take() == "/"
            other = self.factor()
            if other is None or (is_division and not other):
                return None
            value = value / other if is_division else value * other
        return value

    def factor(self) -> Fraction | None:
        self.depth += 1
        try:
            if self.depth > MAX_DEPTH:
                return None
            token = self.next()
            if token in ("-", "+"):
                self.take()
                value = self.factor()
                return None if value is None else -value if token == "-" else value
            if token == "(":
                self.take()
                value = self.sum()
                if value is None or self.next() != ")":
                    return None
                self.take()
                return value
            if token.isdecimal():
                self.numbers.append(int(self.take()))
                return Fraction(self.numbers[-1])
            return None
        finally:
            self.depth -= 1


def parse_expression(text: str) -> Expression | None:
    """The expression, or None for anything else, a division by zero, and text beyond the bounds."""
    if len(text) > MAX_CHARACTERS:
        return None
    tokens, place = [], 0
    stripped = text.rstrip()
    while place < len(stripped):
        match = _TOKEN.match(stripped, place)
        if match is None:
            return None
        tokens.append(match[1])
        place = match.end()
    reader = _Reader(tokens)
    value = reader.sum()
    if value is None or reader.place != len(tokens):
        return None
    return Expression(value, tuple(reader.numbers))


def solutions(numbers: Sequence[int], target: int) -> Iterator[str]:
    """Expressions that use every number once and come to the target, each once.

    Repeatedly joins two values by + - * or /, over all choices: 3 numbers make about 200 orders, 4 about 10,000.
    """
    seen: set[str] = set()
    for text in _joined([(Fraction(number), str(number)) for number in numbers], Fraction(target)):
        if text not in seen:
            seen.add(text)
            yield text


def is_solvable(numbers: Sequence[int], target: int) -> bool:
    """Whether any expression over all the numbers reaches the target; by the values of every part of them.

    3 numbers have about 100 values, 4 about 3,000, 5 about 130,000.
    """
    everything = (1 << len(numbers)) - 1
    values: dict[int, set[Fraction]] = {1 << i: {Fraction(number)} for i, number in enumerate(numbers)}
    for part in range(1, everything + 1):
        if part in values:
            continue
        found: set[Fraction] = set()
        left = (part - 1) & part
        while left > part ^ left:  # each split once
            for a in values[left]:
                for b in values[part ^ left]:
                    found |= {a + b, a - b, b - a, a * b}
                    found |= {a / b} if b else set()
                    found |= {b / a} if a else set()
            left = (left - 1) & part
        values[part] = found
    return Fraction(target) in values[everything]


def _joined(values: list[tuple[Fraction, str]], target: Fraction) -> Iterator[str]:
    if len(values) == 1:
        if values[0][0] == target:
            yield values[0][1]
        return
    for i, j in combinations(range(len(values)), 2):
        rest = [value for k, value in enumerate(values) if k not in (i, j)]
        for pair in _pairs(*values[i], *values[j]):
            yield from _joined([*rest, pair], target)


def _pairs(a: Fraction, left: str, b: Fraction, right: str) -> Iterator[tuple[Fraction, str]]:
    yield a + b, f"({left}+{right})"
    yield a * b, f"({left}*{right})"
    yield a - b, f"({left}-{right})"
    yield b - a, f"({right}-{left})"
    if b:
        yield a / b, f"({left}/{right})"
    if a:
        yield b / a, f"({right}/{left})"
