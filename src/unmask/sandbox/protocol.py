"""What a trainer and a sandbox elsewhere say to each other: JSON over HTTP, checked to the last field on both sides.

    GET  /health   {"protocol", "level", "self_test", "attacks", "workers", "packages", "python", "running", "waiting"}
    POST /judge    {"protocol", "program": {...}} -> {"protocol", "verdict": {...}} or {"protocol", "broken": reason}
    refused        {"protocol", "refused": one of REFUSALS, "text": a line for people}

One request a program, with `Authorization: Bearer TOKEN`, and a connection for each.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.sandbox.verdicts import BrokenTests, Limits, Program, Verdict
from unmask.types import Status

PROTOCOL = 1
HEALTH, JUDGE = "/health", "/judge"
MAX_REQUEST = 32 << 20
"""Bytes of a program with its tests."""
MAX_TESTS, MAX_NAMES, MAX_REASON = 1_000_000, 10_000, 1 << 16
QUEUE_SECONDS = 30.0
"""For which a server lets a request wait for a worker, before it is busy."""
TOKEN_VARIABLE = "UNMASK_SANDBOX_TOKEN"
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
_LEVEL = re.compile(r"[A-Za-z0-9 ()+.,-]{1,80}")

REFUSALS = {
    "malformed": (400, "the request is not as the protocol has it"),
    "version": (400, "the request speaks another version of the protocol"),
    "unauthorized": (401, "the token is missing or wrong"),
    "unknown": (404, "there are GET /health and POST /judge"),
    "too_large": (413, "the request is too large"),
    "lost": (500, "a worker was lost twice on the program"),
    "failed": (500, "the server could not judge the program"),
    "busy": (503, "all workers are busy and the queue is full"),
    "stopping": (503, "the server is about to stop"),
}
"""Why a request is not served: HTTP status and a text. Clients read the name alone."""

STATUSES = frozenset(Status) - {Status.UNPARSED}
_TOP = {"cpu": 86_400.0, "wall": 86_400.0, "memory": 1 << 44, "judge_memory": 1 << 44}
"""No limit is higher."""


class ProtocolError(ValueError):
    """A message is not as it must be. `kind` is a key of REFUSALS."""

    def __init__(self, text: str, kind: str = "malformed"):
        super().__init__(text)
        self.kind = kind


# ---- both directions


def message(**content: Any) -> bytes:
    return json.dumps({"protocol": PROTOCOL, **content}, allow_nan=False).encode()


def read_message(content: bytes) -> dict[str, Any]:
    """The fields of a message but its version. Raises: ProtocolError."""
    try:
        found = json.loads(content.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ProtocolError(f"not JSON ({type(error).__name__})") from error
    if not isinstance(found, dict) or "protocol" not in found:
        raise ProtocolError("no object with a field protocol")
    version = found.pop("protocol")
    if type(version) is not int or version != PROTOCOL:
        shown = str(version)[:20] if type(version) in (int, float) else type(version).__name__
        raise ProtocolError(f"protocol is {shown}, {PROTOCOL} is spoken here", "version")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def require_fields(value: Any, where: str, checks: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """The value if it is an object with just these fields, each of which passes its check. Raises: ProtocolError."""
    if not isinstance(value, dict) or value.keys() != checks.keys():
        raise ProtocolError(f"{where} must be an object of {', '.join(checks)}")
    for name, check in checks.items():
        if not check(value[name]):
            raise ProtocolError(f"{where}.{name} is not of the type or the range that it must have")
    return value


def is_text(longest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and len(value) <= longest


def is_list(kind: type, longest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and len(value) <= longest and all(type(member) is kind for member in value)


def is_count(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def is_seconds(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


# ---- programs and verdicts


def program_message(program: Program) -> bytes:
    """The request to judge a program. Raises: ProtocolError for one that no server would take."""
    stdin = None if program.stdin is None else list(program.stdin)
    fields = asdict(program) | {"tests": list(program.tests), "names": list(program.names), "stdin": stdin}
    _check_program(fields)
    content = message(program=fields)
    if len(content) > MAX_REQUEST:
        raise ProtocolError(f"with its tests it takes {len(content):,} bytes, at most {MAX_REQUEST:,} are sent")
    return content


def read_program(content: bytes) -> Program:
    """What program_message() was given. Raises: ProtocolError."""
    fields = require_fields(read_message(content), "the request", {"program": lambda _: True})["program"]
    _check_program(fields)
    return Program(**{**fields, "limits": Limits(**fields["limits"])})


def _check_program(fields: Any) -> None:
    text = is_text(MAX_REQUEST)
    checks = {
        "source": text,
        "tests": is_list(str, MAX_TESTS),
        "names": is_list(str, MAX_NAMES),
        "setup": text,
        "helpers": text,
        "limits": lambda _: True,
        "copies_back": lambda value: type(value) is bool,
        "stdin": lambda value: value is None or (is_list(str, MAX_TESTS)(value) and len(value) == len(fields["tests"])),
    }
    require_fields(fields, "program", checks)
    times = {name: is_seconds(1e-3, _TOP[name]) for name in ("cpu", "wall")}
    sizes = {name: is_count(1 << 20, int(_TOP[name])) for name in ("memory", "judge_memory")}
    require_fields(fields["limits"], "program.limits", times | sizes)


def verdict_message(verdict: Verdict) -> bytes:
    return message(verdict={**asdict(verdict), "passed": list(verdict.passed)})


def read_verdict(content: bytes, program: Program) -> Verdict:
    """What was said of the program. Raises: ProtocolError; BrokenTests if that is what was said."""
    found = read_message(content)
    if "broken" in found:
        raise BrokenTests(printable(require_fields(found, "the answer", {"broken": is_text(MAX_REASON)})["broken"]))
    fields = require_fields(found, "the answer", {"verdict": lambda _: True})["verdict"]
    num_tests = len(program.tests)
    checks = {
        "status": lambda value: type(value) is str and value in STATUSES,
        "passed": is_list(bool, num_tests),
        "num_tests": is_count(num_tests, num_tests),
        "reason": is_text(MAX_REASON),
        "cpu_seconds": is_seconds(0.0, _TOP["cpu"]),
        "peak_bytes": is_count(0, 1 << 50),
    }
    require_fields(fields, "verdict", checks)
    passed, status = tuple(fields["passed"]), Status(fields["status"])
    if status == Status.CORRECT and not (len(passed) == num_tests > 0 and all(passed)):
        raise ProtocolError("verdict.status is correct, and not every test was passed")
    if status != Status.CORRECT and len(passed) == num_tests > 0 and all(passed):
        raise ProtocolError(f"verdict.status is {status}, and every test was passed")
    return Verdict(**{**fields, "status": status, "passed": passed})


def max_answer(program: Program) -> int:
    """Bytes that an answer about the program may have."""
    return (1 << 20) + 8 * len(program.tests)


# ---- health, tokens, time


def read_health(content: bytes) -> dict[str, Any]:
    """What a server says of itself. Raises: ProtocolError."""
    short, number = is_text(80), is_count(0, 1 << 20)
    checks = {
        "level": lambda value: short(value) and bool(_LEVEL.fullmatch(value)),
        "self_test": lambda value: value == "passed",
        "attacks": is_count(1, 1000),
        "workers": is_count(1, 1 << 16),
        "packages": lambda value: is_list(str, 100)(value) and all(re.fullmatch(r"\w{1,60}", name) for name in value),
        "python": lambda value: short(value) and bool(_LEVEL.fullmatch(value)),
        "running": number,
        "waiting": number,
    }
    return require_fields(read_message(content), "the answer", checks)


def read_refusal(content: bytes) -> str:
    """The key of REFUSALS that an answer names. Raises: ProtocolError."""
    known = {"refused": lambda value: type(value) is str and value in REFUSALS, "text": is_text(1000)}
    return str(require_fields(read_message(content), "the answer", known)["refused"])


def printable(text: str) -> str:
    """One line of a text from elsewhere, as it may stand in a message."""
    return "".join(character if character.isprintable() else " " for character in text[:300])


def read_token(file: str | None, key: str) -> str:
    """The shared secret, from the file, or else from the environment. `key` is the option that names the file.

    Raises: ConfigError, which never shows it.
    """
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
        if not token:
            raise ConfigError(f"no token: name a file that holds it with {key}, or set {TOKEN_VARIABLE}.")
    else:
        where = f"{key} {file}"
        try:
            with open(Path(file).expanduser(), "rb") as opened:
                token = opened.read(4096).decode("ascii", "replace").strip()
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read ({error.strerror}). Name a file with the token.") from error
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{where}: holds no token, which is 16 to 512 letters, digits and ._~+/=- alone. Make one with: "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return token


@contextmanager
def ends_within(connection: socket.socket, seconds: float) -> Iterator[threading.Event]:
    """Whatever waits for the connection reads its end when the time is over, also if it is fed byte by byte. The event
    says that this has happened."""
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield is_over
    finally:
        timer.cancel()
