"""Programs that read standard input and are judged by what they print: a process for each test, one verdict."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from unmask.sandbox.verdicts import Program, Verdict
from unmask.types import Status

NO_MEMORY, NO_PYTHON = 94, 95
"""Exit statuses, see inside/stdio.py."""
LEAST_CPU = 0.05
"""Seconds that have to be left for a further test."""
START_WALL = 0.5
"""Seconds on the clock for each test that all of them may take beyond their wall time: to start a process."""
ENDS = (Status.TIMEOUT, Status.FORBIDDEN)
"""After these no further test is run."""


def run_tests(ask: Callable[[Program], dict[str, Any]], program: Program) -> Verdict:
    """All tests of a program, which share its CPU time and its time on the clock; `ask` runs a program with one test.
    The status and reason are those of the first test that is not passed."""
    assert program.stdin is not None
    passed: list[bool] = []
    failed: Verdict | None = None
    used, peak, pace = 0.0, 0, program.limits.wall / program.limits.cpu
    clock, most = 0.0, longest(program) - program.limits.wall
    for given, expected in zip(program.stdin, program.tests, strict=True):
        left = program.limits.cpu - used
        if left < LEAST_CPU:
            failed = failed or Verdict(Status.TIMEOUT, (), 1, "no CPU time is left")
            break
        if clock > most:
            failed = failed or Verdict(Status.TIMEOUT, (), 1, "no time on the clock is left")
            break
        limits = replace(program.limits, cpu=left, wall=pace * left)
        one = replace(program, tests=[expected], stdin=[given], limits=limits)
        began = time.monotonic()
        verdict = classify(ask(one), one)
        clock += min(time.monotonic() - began, limits.wall)  # more than that went by with a worker that was lost
        used, peak = used + verdict.cpu_seconds, max(peak, verdict.peak_bytes)
        passed.append(verdict.passed == (True,))
        if not passed[-1]:
            failed = failed or replace(verdict, reason=f"test {len(passed)}: {verdict.reason}")
        if verdict.status in ENDS:
            break
    status, reason = (failed.status, failed.reason) if failed else (Status.CORRECT, "")
    if not passed and not failed:  # nothing passes no tests
        status = Status.WRONG
    return Verdict(status, tuple(passed), len(program.tests), reason, used, peak)


def longest(program: Program) -> float:
    """Seconds on the clock after which all tests of a program are over."""
    return 2 * program.limits.wall + START_WALL * len(program.tests)


def classify(answer: dict[str, Any], program: Program) -> Verdict:
    """Of one test: passed if the output is the expected one and the program ended by itself with status 0."""
    judge, child = answer["judge"] or {}, answer["candidate"]
    reason, killed, status = str(judge.get("reason", "")), child["signal"], Status.WRONG
    is_over = answer["ended"] == "done" and not killed and child["exit"] == 0
    is_passed = is_over and judge.get("passed") == [True]
    if is_passed:
        status = Status.CORRECT
    elif killed == signal.SIGSYS:
        status = Status.FORBIDDEN
    elif answer["ended"] in ("cpu", "wall") or killed == signal.SIGXCPU or child["cpu"] >= program.limits.cpu:
        status = Status.TIMEOUT
    elif killed or child["exit"] == NO_PYTHON:
        status = Status.ERROR
    elif child["exit"] == NO_MEMORY:
        status = Status.OUT_OF_MEMORY
    if not is_over:
        reason = f"killed by signal {killed}" if killed else f"exit status {child['exit']}"
    return Verdict(status, (is_passed,), 1, reason, child["cpu"], child["memory"])
