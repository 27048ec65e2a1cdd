"""Tests that are comparisons with literals: which are, and what the judge that stays makes of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from unmask.sandbox.literal import literal_cases
from unmask.sandbox.pool import HEAVY, LocalSandbox, SandboxUnavailable, imports_any
from unmask.sandbox.verdicts import Limits, Program

QUICK = Limits(cpu=1.0, wall=6.0)


def program(source: str, *tests: str, **settings) -> Program:
    return Program(source, tests, ["f"], **({"limits": QUICK} | settings))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


LITERAL = [
    "assert f(1) == 2",
    "assert f() == None, 'why'",
    "assert f(-1, 2.5, x='a', y={1: (2,)}) == [set(), {1, 2}, b'x', 1 + 2j, True]",
    "assert f([[1, 2], []]) == 'x'\nassert f(2) == 3",
]
MORE = [
    "assert f(1) != 2", "assert f(1) is True", "assert f(1)", "assert not f(1)", "assert 2 == f(1)",
    "assert f(1) == 2 == 2", "assert g(1) == 2", "assert f(x) == 2", "assert f(*[1]) == 2", "assert f(**{'x': 1}) == 2",
    "assert f(1) == g(2)", "assert f(float('inf')) == 2", "assert set(f(1)) == {1}", "f(1)", "x = f(1)", "",
    "assert (", "assert f(1) == 2, g()", "assert f(1) == 2; import os",
]  # fmt: skip


def test_which_tests_are_literal():
    assert [test for test in LITERAL if literal_cases(program("", test)) is None] == []
    assert [test for test in MORE if literal_cases(program("", test)) is not None] == []
    assert literal_cases(program("", LITERAL[0], MORE[0])) is None  # all of them, or none
    for settings in ({"setup": "k = 1"}, {"helpers": "k = 1"}, {"limits": Limits(judge_memory=1 << 30)}):
        assert literal_cases(program("", LITERAL[0], **settings)) is None
    assert literal_cases(program("", "assert f(" + "1 + " * 5_000 + "1) == 2")) is None
    assert literal_cases(program("", f"assert f({'1' * (1 << 20)!r}) == 2")) is None


def test_both_judges_say_the_same(sandbox):
    sources = [
        "def f(*a, **k): return 2",
        "def f(*a, **k): return [set(), {1, 2}, b'x', 1 + 2j, True]",
        "def f(*a, **k): return a[0]",
        "def f(*a, **k): return iter([1])",
        "def f(*a, **k): raise KeyError(a)",
        "class I(int):\n    __eq__ = lambda s, o: True\ndef f(*a, **k): return I(7)",
        "def f(*a, **k): return object()",
        "import sys\ndef f(*a, **k): sys.exit(0)",
        "import os\ndef f(*a, **k): os._exit(0)",
        "def f(a): return a",
        "def g(): pass",
        "1 +",
    ]
    tests = [*LITERAL, "assert f({1, 2}) == {2, 1}", "assert f((1, 2)) == (1, 2)"]
    assert literal_cases(program("", *tests)) is not None
    for source in sources:
        stays, executes = sandbox.run([program(source, *tests), program(source, *tests, setup="pass")])
        assert (stays.status, stays.passed) == (executes.status, executes.passed), source
        assert stays.reason.split(":")[0] == executes.reason.split(":")[0], source
    assert sandbox.run([program(sources[0], "assert f(1) == 2")])[0].status == "correct"


def test_what_the_judge_that_stays_was_sent_is_not_found_by_a_program(sandbox):
    thief = """
import sys, gc
texts, frame = [], sys._getframe()
while frame:
    texts += [repr(frame.f_locals), repr(frame.f_globals)]
    frame = frame.f_back
found = gc.get_objects()
texts += [o for o in found if isinstance(o, str)] + [repr(o) for o in found if isinstance(o, (dict, list, tuple))]
def f(x):
    wanted = ''.join(map(chr, range(55, 48, -1)))  # made now, so that it is in none of the texts by itself
    return int(wanted) if any(wanted in text for text in texts) else 0
"""
    asked = program(thief, "assert f(2) == 7654321", limits=Limits(cpu=10, wall=40))
    first = program("def f(x): return 0", "assert f(2) == 7654321")
    assert [v.status for v in sandbox.run([first, asked, first, asked])] == ["wrong"] * 4


def test_a_lost_judge_is_no_verdict(sandbox):
    honest = program("def f(x): return x", "assert f(2) == 2")
    assert sandbox.run([honest])[0].status == "correct"
    worker = sandbox._all[0]
    (judge,) = children(worker.process.pid)
    os.kill(judge, signal.SIGKILL)
    assert sandbox.run([honest])[0].status == "correct"
    assert worker not in sandbox._all and worker.process.poll() is not None
    assert sandbox.run([honest])[0].status == "correct" and len(sandbox._all) == 1


@pytest.mark.slow
def test_a_judge_that_is_kept_busy_costs_the_program_alone(sandbox):
    """A message made by hand: decoding its keys, which all have one hash, takes longer than anyone waits."""
    flood = """
import json, os, struct
keys = [[{"i": hex(i * (2 ** 61 - 1))}, 0] for i in range(60_000)]
message = json.dumps({"value": {"d": keys}}).encode()
def f(x):
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, struct.pack("=I", len(message)))
        except OSError:
            continue
        rest = memoryview(message)
        while rest:
            rest = rest[os.write(descriptor, rest):]
"""
    limits = Limits(cpu=5, wall=1.0)
    found = sandbox.run([program(flood, "assert f(2) == 4", limits=limits)])[0]
    assert found.status != "correct" and found.passed in ((), (False,))
    assert sandbox.run([program("def f(x): return x", "assert f(2) == 2")])[0].status == "correct"


def test_judges_end_with_their_worker():
    try:
        pool = LocalSandbox(packages=())
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    worker = pool._all[0]
    (judge,) = children(worker.process.pid)
    os.kill(worker.process.pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while Path(f"/proc/{judge}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not Path(f"/proc/{judge}").exists()
    pool.close()


def test_workers_hold_what_programs_import(sandbox):
    modules = {*HEAVY, "numpy"}
    for text in ("import numpy as np", "from random import choice", "import math, random", "x = 1; import asyncio"):
        assert imports_any(modules, ["pass", text])
    for text in (
        "import math",
        "def random(): return 'numpy'",
        "import re  # no random",
        "from collections import deque",
    ):
        assert not imports_any(modules, [text])
    found = sandbox.run([program("import numpy, random\ndef f(x): return numpy.ones(x).sum()", "assert f(2) == 2.0")])[
        0
    ]
    assert found.status == "correct" and {worker.is_heavy for worker in sandbox._all} == {False, True}
    lazily = program(
        "def f(x): return len(__import__('numpy').ones(x))", "assert f(2) == 2", limits=Limits(cpu=9, wall=30)
    )
    assert sandbox.run([lazily])[0].status == "correct"
