"""Programs that read standard input: the process that runs one, and the one that feeds it and compares what it prints.

The program has pipes in the places of standard input and output, and nothing else. The judge writes the input of one
test, reads a bounded output, and holds the expected one, which never comes near the program.
"""

from __future__ import annotations

import atexit
import builtins
import json
import os
import select
import sys
import types
from typing import Any

from channel import send

MAX_OUTPUT = 1 << 20
"""Bytes that a program may print in one test."""
NO_MEMORY, NO_PYTHON = 94, 95
"""Exit statuses by which a program says what befell it; its own word."""
_PART = 1 << 16


def run(stdin: int, stdout: int, source: str) -> None:
    """Run a program as Python runs a file, with the pipes as its standard streams. Does not return."""
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.close(stdin)
    os.close(stdout)
    as_text: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
    sys.stdin = sys.__stdin__ = os.fdopen(0, **as_text)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = out = os.fdopen(1, "w", **as_text)  # type: ignore[misc]
    sys.argv = ["solution.py"]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        code = compile(source.removeprefix("\ufeff"), "<solution>", "exec", dont_inherit=True)
    except BaseException:
        os._exit(NO_PYTHON)
    status = executed(code, vars(module) | {"__builtins__": builtins})
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # waits for threads, as the end of a program does
        atexit._run_exitfuncs()
        for stream in {id(s): s for s in (sys.stdout, out)}.values():
            if not stream.closed:
                stream.flush()
    except BaseException:
        status = status or 1
    os._exit(status)


def executed(code: types.CodeType, names: dict[str, Any]) -> int:
    """The exit status of a program."""
    try:
        exec(code, names)
    except SystemExit as error:
        if error.code is None:
            return 0
        return error.code & 255 if isinstance(error.code, int) else 1
    except MemoryError:
        return NO_MEMORY
    except BaseException:
        return 1
    return 0


# ---- the other side


def judge(stdin: int, stdout: int, tests: int, result: int) -> None:
    """Feed the program, read what it prints, and say whether that is the expected output. Does not return."""
    with os.fdopen(tests, "rb") as file:
        file.seek(0)
        task = json.loads(file.read())
    printed = exchange(stdin, stdout, task["input"].encode("utf-8", "replace"))
    reason = "too much output" if printed is None else difference(printed.decode("utf-8", "replace"), task["output"])
    send(result, json.dumps({"loaded": True, "passed": [not reason], "reason": reason}).encode())
    os._exit(0)


def exchange(stdin: int, stdout: int, content: bytes) -> bytes | None:
    """What a program prints that is given this input; None if it is too much. It need not read all."""
    os.set_blocking(stdin, False)
    parts: list[bytes] = []
    size, rest, is_open = 0, memoryview(content), True
    while True:
        if is_open and not rest:
            os.close(stdin)
            is_open = False
        readable, writable, _ = select.select([stdout], [stdin] if is_open else [], [])
        if writable:
            try:
                rest = rest[os.write(stdin, rest[:_PART]) :]
            except BlockingIOError:
                pass
            except OSError:  # the program reads no more
                rest = rest[:0]
        if readable:
            part = os.read(stdout, _PART)
            if not part:
                return b"".join(parts)
            size += len(part)
            if size > MAX_OUTPUT:
                return None
            parts.append(part)


def difference(printed: str, expected: str) -> str:
    """Where two outputs differ, white space at the ends of lines and lines at the end aside; "" if nowhere."""
    found, wanted = lines(printed), lines(expected)
    if found == wanted:
        return ""
    place = next(
        (n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
    )
    return f"another output from line {place + 1} on"


def lines(text: str) -> list[str]:
    """Without white space at their ends, and without empty ones at the end of all."""
    found = [line.rstrip() for line in text.split("\n")]
    while found and not found[-1]:
        found.pop()
    return found
