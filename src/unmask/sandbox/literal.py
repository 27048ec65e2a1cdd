"""Tests that compare calls with literals: they need no execution, so that one judge serves all programs."""

from __future__ import annotations

import ast
import json
import warnings
from functools import lru_cache

from unmask.sandbox.verdicts import Limits, Program

MAX_MESSAGE = 8 << 20
"""Bytes of a message that the sandbox takes, see inside/wire.py."""
MAX_CHARACTERS = 1 << 20
"""Of all tests of a program; longer ones take the judge that executes them."""


def tree(code: str) -> ast.Module:
    """The syntax tree, without the warnings that odd strings in it would raise. Raises: SyntaxError and others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def literal_cases(program: Program) -> bytes | None:
    """The message to the judge that stays (sandbox/inside/lasting.py); None if a test is more than such comparisons."""
    plain = not program.setup.strip() and not program.helpers.strip()
    if not plain or program.limits.judge_memory != Limits.judge_memory:
        return None
    return _cases(tuple(program.tests), frozenset(program.names))


@lru_cache(maxsize=1024)
def _cases(tests: tuple[str, ...], names: frozenset[str]) -> bytes | None:
    if sum(map(len, tests)) > MAX_CHARACTERS:
        return None
    found = []
    for test in tests:
        try:
            body = tree(test).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        cases = [_case(statement, names) for statement in body]
        if not cases or None in cases:
            return None
        found.append(cases)
    message = json.dumps(found).encode()
    return message if len(message) <= MAX_MESSAGE else None


def _case(statement: ast.stmt, names: frozenset[str]) -> tuple[str, str, str] | None:
    """(name, arguments, expected), of `assert name(literals) == literal`, the last two as texts of literals."""
    if not (isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)):
        return None
    call, ops, values = statement.test.left, statement.test.ops, statement.test.comparators
    message = statement.msg is None or isinstance(statement.msg, ast.Constant)
    if not (message and isinstance(call, ast.Call) and len(values) == 1 and isinstance(ops[0], ast.Eq)):
        return None
    if not (isinstance(call.func, ast.Name) and call.func.id in names):
        return None
    if any(keyword.arg is None for keyword in call.keywords):
        return None
    named = ast.Dict([ast.Constant(k.arg) for k in call.keywords], [k.value for k in call.keywords])
    parts = (ast.Tuple([ast.List(call.args, ast.Load()), named], ast.Load()), values[0])
    try:
        for part in parts:
            ast.literal_eval(part)  # a starred argument is none, neither is a name or a call but set()
        arguments, expected = map(ast.unparse, parts)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return call.func.id, arguments, expected
