"""What the sandbox says about a program, and what it is asked."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from unmask.errors import RewardError
from unmask.types import Status


class BrokenTests(RewardError):
    """The tests of a program cannot be run, whatever the program is. `reason` is what they raised."""

    def __init__(self, reason: str):
        super().__init__(f"the tests of a program cannot be used: their helpers fail ({reason}). Mend the row.")
        self.reason = reason


class LostWorker(RewardError):
    """No worker lived to say how a program fared, which is no verdict."""


@dataclass(frozen=True)
class Limits:
    """Of one program. CPU time decides; wall time is there for programs that sleep."""

    cpu: float = 2.0
    """Seconds of CPU for loading the program and answering all tests."""
    wall: float = 6.0
    """Seconds on the clock."""
    memory: int = 512 << 20
    """Bytes of address space."""
    judge_memory: int = 2 << 30
    """The same for the process that runs the tests."""


@dataclass(frozen=True)
class Program:
    """A program and the tests that it has to pass. Only `names` come from the program; tests see nothing else of it."""

    source: str
    tests: Sequence[str]
    """Statements, each one test: it passes if it raises nothing. With `stdin`: outputs that are expected."""
    names: Sequence[str]
    """What the program has to define: functions that the tests call, classes that they build."""
    setup: str = ""
    """Trusted, run before the tests, which see its names."""
    helpers: str = ""
    """Trusted, run before that; the program's `names` hide names of the helpers."""
    limits: Limits = field(default_factory=Limits)
    copies_back: bool = False
    """What a call does to its arguments is done to the tests' lists, dictionaries, sets, deques and byte arrays too."""
    stdin: Sequence[str] | None = None
    """The program reads standard input: what it is given for each of `tests`. It is run anew for each of them, and has
    to end with status 0. There are no names, setup or helpers then."""


@dataclass(frozen=True)
class Verdict:
    """`status` says why; `passed` are the tests in their order, of which a program that was stopped has fewer."""

    status: Status
    passed: tuple[bool, ...]
    num_tests: int
    reason: str = ""
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def share(self) -> float:
        """Of tests passed; what was not reached counts as failed."""
        return sum(self.passed) / self.num_tests if self.num_tests else 0.0


class Sandbox(Protocol):
    """Runs programs that are not trusted, here or elsewhere."""

    @property
    def level(self) -> str:
        """How programs are confined, for logs."""
        ...

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        """A verdict for each program, in their order. Raises: RewardError if that cannot be had."""
        ...

    def close(self) -> None: ...


def classify(answer: dict[str, Any], program: Program) -> Verdict:
    """From what the supervisor and the judge report: pass > forbidden > timeout > out of memory > error > fail."""
    judge, child = answer["judge"] or {}, answer["candidate"]
    if "broken" in judge:
        raise BrokenTests(judge["broken"])
    passed = tuple(bool(value) for value in judge.get("passed", ()))[: len(program.tests)]
    reason = str(judge.get("reason", ""))
    loaded = bool(judge.get("loaded"))
    killed = child["signal"]
    left_alone = answer["ended"] == "done" and killed == signal.SIGKILL  # by the supervisor, after the judge was done
    status = Status.WRONG
    if loaded and passed and len(passed) == len(program.tests) and all(passed):  # nothing passes no tests
        status = Status.CORRECT
    elif killed == signal.SIGSYS:
        status = Status.FORBIDDEN
    elif answer["ended"] in ("cpu", "wall") or killed == signal.SIGXCPU or child["cpu"] >= program.limits.cpu:
        status = Status.TIMEOUT
    elif reason.startswith("MemoryError"):
        status = Status.OUT_OF_MEMORY
    elif (not loaded and reason != "gone") or (killed and not left_alone):
        status = Status.ERROR
    return Verdict(status, passed, len(program.tests), reason, child["cpu"], child["memory"])
