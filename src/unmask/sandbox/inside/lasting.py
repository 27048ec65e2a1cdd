"""The judge that stays: compares what programs return with literals, one program after the other.

It executes nothing, neither tests nor programs: arguments and expected values are read by `ast.literal_eval` from text
that the trainer sends it past the supervisor. Nothing is forked from it, so that no program inherits what it knows.
"""

from __future__ import annotations

import ast
import json
import os
import socket
from typing import Any

from channel import receive, send
from judge import Gone, Link, describe
from wire import WireError

MAX_KEPT = 64
"""Sets of cases that are kept in parsed form: the completions of a group have the same tests."""

MAX_AHEAD = 32 << 10
"""Bytes of requests that may wait in a socket."""

Case = tuple[bytes | WireError, Any]
"""The request to the program, or why its arguments cannot be sent; and the value that it has to return."""


def read_cases(content: bytes) -> list[list[Case]]:
    """The cases of each test, from [[[name, arguments, expected], ...], ...] with Python literals as texts."""
    return [[read_case(*case) for case in test] for test in json.loads(content)]


def read_case(name: str, arguments: str, expected: str) -> Case:
    positional, named = ast.literal_eval(arguments)
    value = ast.literal_eval(expected)
    try:
        return Link.request({"name": name}, positional, named), value
    except WireError as error:
        return error, value


def judge(link: Link, tests: list[list[Case]]) -> dict[str, Any]:
    """As `judge.run` says it."""
    found: dict[str, Any] = {"loaded": False, "passed": [], "reason": ""}
    try:
        link.read()
        found["loaded"] = True
        is_ahead = may_go_ahead(tests)
        if is_ahead:
            link.write(*(request for test in tests for request, _ in test))
        for test in tests:
            reason = compare(link, test, is_ahead)
            found["passed"].append(not reason)
            found["reason"] = found["reason"] or reason
    except Gone:
        found["reason"] = "gone"
    except Exception as error:
        found["reason"] = describe(error)
    return found


def may_go_ahead(tests: list[list[Case]]) -> bool:
    """Whether all requests may be sent before the first answer is read, which saves most changes between processes:
    each test is one call, and all together fit into the socket, so that neither side waits for the other to read."""
    size = 0
    for test in tests:
        if len(test) != 1 or isinstance(test[0][0], WireError):
            return False
        size += len(test[0][0]) + 4
    return size <= MAX_AHEAD


def compare(link: Link, test: list[Case], is_ahead: bool) -> str:
    """Why a test fails; "" if each of its cases returns what is expected. Raises: Gone."""
    for request, expected in test:
        try:
            if isinstance(request, WireError):
                return describe(request)
            is_equal = (link.read() if is_ahead else link.exchange(request)) == expected
            if not is_equal:
                return "AssertionError"
        except Exception as error:
            return describe(error)
    return ""


def main(trainer: int, supervisor: int) -> None:
    """For each program: its cases from the trainer, the socket to it from the supervisor; then a byte to the
    supervisor, that it may end the program, and the result to the trainer. Ends when either has gone."""
    programs = socket.socket(fileno=supervisor)
    kept: dict[bytes, list[list[Case]]] = {}
    while True:
        content = receive(trainer)
        if content not in kept:
            if len(kept) >= MAX_KEPT:
                kept.clear()
            kept[content] = read_cases(content)
        _, descriptors, _, _ = socket.recv_fds(programs, 1, 1)
        found = judge(Link(descriptors[0]), kept[content])
        os.close(descriptors[0])
        programs.send(b".")
        send(trainer, json.dumps(found).encode("utf-8", "backslashreplace"))
