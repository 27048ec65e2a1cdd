"""The sandbox: honest programs pass, attacks reach nothing, forgeries pass nothing, and the pool is healthy after each."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import ConfigError, RewardError
from unmask.sandbox import pool as pool_module
from unmask.sandbox import self_test
from unmask.sandbox.pool import LocalSandbox, SandboxUnavailable
from unmask.sandbox.verdicts import Limits, Program

INSIDE = Path(pool_module.SUPERVISOR).parent
QUICK = Limits(cpu=1.0, wall=6.0)


def squares(source: str, **settings) -> Program:
    return Program(source, ["assert f(2) == 4", "assert f(3) == 9"], ["f"], **({"limits": QUICK} | settings))


JUDGES = ["", "pass"]
"""As setup: nothing, so that the judge that stays compares literals, or anything, for a judge that executes the tests."""


def verdict(sandbox, program):
    """Of a program, and then of an honest one: nothing may stay behind."""
    found = sandbox.run([program])[0]
    assert sandbox.run([squares("def f(x): return x * x")])[0].status == "correct"
    return found


# ---- honest programs


HONEST = {
    "prints on both streams": "import sys\ndef f(x):\n    for _ in range(200): print('x' * 1000, flush=True); print('y', file=sys.stderr, flush=True)\n    return x * x",
    "dataclass with annotations as text": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n    next: 'A' = None\ndef f(x): return A(x).x ** 2",
    "home directory": "import os\nh = os.path.expanduser('~')\ndef f(x): return x * x",
    "plain": "def f(x): return x * x",
    "generator": "def f(x): return sum(x for _ in range(x))",
    "class": "class A:\n    def __init__(self, x): self.x = x\n    def go(self): return self.x ** 2\ndef f(x): return A(x).go()",
    "thread": "import threading\ndef f(x):\n    r = []\n    t = threading.Thread(target=lambda: r.append(x * x))\n    t.start(); t.join()\n    return r[0]",
    "asyncio": "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x * x\ndef f(x): return asyncio.run(g(x))",
    "numpy": "import numpy as np\ndef f(x): return (np.ones(x) * x).sum().astype(int)",
    "recursion": "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return g(900) - 900 + x * x",
    "main guard": "def f(x): return x * x\nif __name__ == '__main__':\n    raise SystemExit",
    "byte-order mark": "\ufeffdef f(x): return x * x",
    "reads stdin": "import sys\ns = sys.stdin.read()\ndef f(x): return x * x + len(s)",
    "prints": "print('PASS ' * 1000)\ndef f(x): print(x); return x * x",
    "tries to write": "def f(x):\n    try:\n        open('/tmp/log', 'w')\n    except OSError:\n        pass\n    return x * x",
    "lazy import": "def f(x):\n    import xml.dom.minidom, csv, sqlite3 as _\n    return x * x",
    "random": "import random\nrandom.seed(0)\ndef f(x): return x * x + 0 * random.random()",
    "regular": "import re, itertools, functools, collections, heapq\ndef f(x): return len(re.findall('a', 'a' * (x * x)))",
}  # fmt: skip


@pytest.mark.parametrize("setup", JUDGES)
@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(sandbox, name, setup):
    found = sandbox.run([squares(HONEST[name], limits=Limits(cpu=5, wall=20), setup=setup)])[0]
    assert found.status == "correct" and found.share == 1.0, found


@pytest.mark.parametrize("setup", JUDGES)
def test_verdicts(sandbox, setup):
    cases = {
        "def f(x): return 4": ("wrong", (True, False)),
        "def f(": ("error", ()),
        "raise ValueError('no')": ("error", ()),
        "def g(x): return 1": ("wrong", (False, False)),
        "def f(x):\n    while True: pass": ("timeout", ()),
        "while True: pass": ("timeout", ()),
        "import os\ndef f(x): os._exit(0)": ("wrong", ()),
        "raise SystemExit(0)": ("error", ()),
        "def f(x): raise SystemExit(0)": ("wrong", (False, False)),
        "def f(x): return bytearray(10 ** 10)": ("out_of_memory", (False, False)),
        "import ctypes\ndef f(x): ctypes.string_at(0)": ("error", ()),
        "import os\ndef f(x): os.fork()": ("forbidden", ()),
        "import os\ndef f(x): os.abort()": ("error", ()),
        "": ("wrong", (False, False)),
    }
    found = {source: sandbox.run([squares(source, setup=setup)])[0] for source in cases}
    assert {source: (v.status, v.passed) for source, v in found.items()} == cases
    assert found["def f(x): return 4"].share == 0.5
    assert found["while True: pass"].cpu_seconds >= 0.9


def test_cpu_time_decides_and_wall_time_is_the_backstop(sandbox):
    began = time.monotonic()
    asleep = squares("import time\ndef f(x): time.sleep(60)", limits=Limits(cpu=5, wall=1.0))
    assert verdict(sandbox, asleep).status == "timeout"
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass"
    assert verdict(sandbox, squares(stubborn)).status == "timeout"
    in_c = "def f(x): return sum(range(10 ** 12))"
    assert verdict(sandbox, squares(in_c)).status == "timeout"
    assert time.monotonic() - began < 60


def test_helpers_setup_and_names(sandbox):
    helpers = "def double(x): return 2 * x\ndef f(x): return None\n"
    identity = "def double(x): return x\ndef f(x): return x * 4"
    program = Program(identity, ["assert double(f(2)) == 16", "assert k == 5"], ["f"], setup="k = 5", helpers=helpers)
    assert sandbox.run([program])[0].status == "correct"  # double is the helpers', f the program's
    hidden = Program("def f(x): return x\ng = f", ["assert g(1) == 1"], ["f"])
    assert "NameError" in sandbox.run([hidden])[0].reason


def test_objects_of_the_program_are_reached_by_attributes_and_methods(sandbox):
    source = """
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
    def total(self): return self.value + (self.next.total() if self.next else 0)
def build(values):
    node = None
    for value in reversed(values): node = Node(value, node)
    return node
"""
    tests = [
        "n = Node(1, Node(2)); assert n.total() == 3 and n.next.value == 2",
        "n = build([4, 5]); n.value = 10; assert n.total() == 15",
        "assert build([1]) != build([1])",
        "assert build([1, 2]).next.total() == 2",
    ]
    assert sandbox.run([Program(source, tests, ["Node", "build"])])[0].status == "correct"


def test_arguments_travel_by_value_and_exceptions_by_name(sandbox):
    emptied = "def f(x):\n    x.clear()\n    return x"
    assert sandbox.run([Program(emptied, ["v = [1, 2]; assert f(v) == sorted(v)"], ["f"])])[0].status == "wrong"
    raising = "class Odd(Exception): pass\ndef f(x):\n    if x: raise ValueError('bad')\n    raise Odd('odd')"
    tests = [
        "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'bad'\nelse:\n    assert False",
        "try:\n    f(0)\nexcept RuntimeError as e:\n    assert 'Odd' in str(e)\nelse:\n    assert False",
    ]
    assert sandbox.run([Program(raising, tests, ["f"])])[0].status == "correct"


def test_limits_are_those_of_one_value_and_results_may_be_long(sandbox):
    many = Program(
        "def f(n): return [1] * n", ["assert len(f(90_000)) == 90_000"] * 6, ["f"], limits=Limits(cpu=20, wall=60)
    )
    assert sandbox.run([many])[0].status == "correct"
    long = Program("def f(x): return x * x", ["assert f(2) == 4"] * 15_000, ["f"], limits=Limits(cpu=30, wall=90))
    found = sandbox.run([long])[0]
    assert found.status == "correct" and len(found.passed) == 15_000


def test_tests_that_compute_for_long_are_not_held_against_the_program(sandbox):
    slow = "import time\nbegan = time.process_time()\nwhile time.process_time() - began < 0.7: pass\nassert f(2) == 4"
    limits = Limits(cpu=2.0, wall=0.6)
    assert sandbox.run([Program("def f(x): return x * x", [slow], ["f"], limits=limits)])[0].status == "correct"
    asleep = Program("import time\ndef f(x): time.sleep(9)", ["k = 1", "assert f(2) == 4"], ["f"], limits=limits)
    began = time.monotonic()
    found = sandbox.run([asleep])[0]
    assert (found.status, found.passed) == ("timeout", (True,)) and time.monotonic() - began < 2.0  # not tried again


def test_a_program_without_tests_passes_none(sandbox):
    assert sandbox.run([Program("def f(x): return x", [], ["f"], limits=QUICK)])[0].status == "wrong"


def test_a_socket_cannot_be_kept_in_flight(sandbox):
    source = (
        "import os, socket, stat\n"
        "def f(x):\n"
        "    fd = next(n for n in range(3, 64) if is_socket(n))\n"
        "    a, b = socket.socketpair()\n"
        "    socket.send_fds(a, [b'x'], [fd, a.fileno(), b.fileno()])\n"
        "    os._exit(0)\n"
        "def is_socket(n):\n"
        "    try: return stat.S_ISSOCK(os.fstat(n).st_mode)\n"
        "    except OSError: return False\n"
    )
    began = time.monotonic()
    found = sandbox.run([Program(source, ["assert f(1) == 1"], ["f"], limits=Limits(cpu=2.0, wall=20.0))])[0]
    assert found.status != "correct" and time.monotonic() - began < 10


def test_types_may_be_arguments(sandbox):
    program = Program("def f(x, kind): return isinstance(x, kind)", ["assert f(2, int) and not f(2, str)"], ["f"])
    assert sandbox.run([program])[0].status == "correct"


def test_broken_helpers_are_the_rows_fault(sandbox):
    with pytest.raises(RewardError, match=r"their helpers fail .ModuleNotFoundError"):
        sandbox.run([squares("def f(x): return x * x", helpers="import no_such_module")])


# ---- attacks


def test_what_was_expected_of_one_program_is_not_found_by_the_next(sandbox):
    check = "def ck(o, e): assert o == e, f'out: {o}, exp: {e}'\nck(f(2), 1234567)"
    thief = """
import sys, re, gc
texts, frame = [], sys._getframe()
while frame:
    texts += [repr(frame.f_locals), repr(frame.f_globals)]
    frame = frame.f_back
texts += [o for o in gc.get_objects() if isinstance(o, str)] + [repr(o) for o in gc.get_objects() if isinstance(o, dict)]
found = [m[1] for text in texts for m in re.finditer(r'exp: ([0-9]+)', text)]
def f(x): return int(found[0])
"""
    first = Program("def f(x): return 0", [check], ["f"])
    second = Program(thief, [check], ["f"], limits=Limits(cpu=10, wall=40))
    verdicts = sandbox.run([first, second, first, second])
    assert [v.status for v in verdicts] == ["wrong"] * 4
    assert "exp: 1234567" in verdicts[0].reason  # the trainer alone reads it


def test_a_loop_of_the_tests_is_not_ended_by_the_program(sandbox):
    stop = "def f(x): raise StopIteration"
    tests = ["for r in map(f, [1, 2]): assert r == 99", "assert sum(map(f, [1])) == 0"]
    assert sandbox.run([Program(stop, tests, ["f"])])[0].passed == (False, False)


@pytest.mark.parametrize("target", ["os.getppid()", "-os.getppid()", "os.getpid() + 1", "-os.getpgrp()"])
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_signals_are_not_sent_by_way_of_a_descriptor(sandbox, target, number):
    source = f"""
import fcntl, os, socket, signal
a, b = socket.socketpair()
for step in (lambda: fcntl.fcntl(a, 10, signal.{number}), lambda: fcntl.fcntl(a, 8, {target}),
             lambda: fcntl.fcntl(a, fcntl.F_SETFL, fcntl.fcntl(a, fcntl.F_GETFL) | os.O_ASYNC)):
    try:
        step()
    except OSError:
        pass
b.send(b'x')
def f(x): return x * x
"""
    assert verdict(sandbox, squares(source)).status == "correct"  # refused, and harmless


EQUAL = "class Yes:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    __lt__ = __gt__ = __le__ = __ge__ = __eq__\n    def __hash__(s): return 0\n    def __bool__(s): return True\n    def __len__(s): return 4\n    def __getattr__(s, n): return s\n    def __call__(s, *a): return s\n"
FORGERIES = {
    "equal to everything": EQUAL + "def f(x): return Yes()",
    "number equal to everything": "class I(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return I(7)",
    "list equal to everything": "class L(list):\n    __eq__ = lambda s, o: True\ndef f(x): return L()",
    "quiet exit": "import os\nos._exit(0)",
    "exit from a thread": "import os, threading\ndef f(x):\n    threading.Thread(target=lambda: os._exit(0)).start()\n    return None",
    "success words everywhere": "import os, json, struct\nfor d in range(3, 60):\n    for m in (b'PASS', json.dumps({'loaded': True, 'passed': [True, True]}).encode()):\n        try: os.write(d, struct.pack('=I', len(m)) + m)\n        except OSError: pass\ndef f(x): return None",
    "a false answer ahead of the call": "import os, json, struct, sys\nm = json.dumps({'passed': [True, True], 'loaded': True}).encode()\nfor d in range(3, 60):\n    try: os.write(d, struct.pack('=I', len(m)) + m)\n    except OSError: pass",
    "patched builtins": "import builtins\nbuiltins.AssertionError = KeyError\nbuiltins.len = lambda *a: 4\ndef f(x): return None",
    "frames": "import sys\ndef f(x):\n    g = sys._getframe()\n    while g:\n        for n, v in list(g.f_locals.items()):\n            if 'passed' in str(n): v[:] = [True, True]\n        g = g.f_back\n    return None",
    "garbage collector": "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, str) and 'assert f' in o: return 4 if '4' in o else 9\n    return None",
    "memory": "def f(x):\n    t = open('/proc/self/mem', 'rb').read()\n    return None",
    "swallows what follows": "def f(x): return None\n'''",
    "pickle": "import pickle\nclass P:\n    def __reduce__(s): return (exec, ('raise SystemExit(0)',))\ndef f(x): return pickle.dumps(P())",
}  # fmt: skip


@pytest.mark.parametrize("setup", JUDGES)
@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_pass_nothing(sandbox, name, setup):
    found = verdict(sandbox, squares(FORGERIES[name], setup=setup))
    assert found.status != "correct" and not any(found.passed)


EXHAUSTION = {
    "threads": "import threading, time\ndef f(x):\n    for _ in range(10 ** 5): threading.Thread(target=time.sleep, args=(99,)).start()",
    "heap": "def f(x):\n    a = []\n    while True: a.append(' ' * 10 ** 6)",
    "mapping": "import mmap\ndef f(x): return len([mmap.mmap(-1, 1 << 28) for _ in range(100)])",
    "descriptors": "import os\ndef f(x): return len([os.pipe() for _ in range(10 ** 5)])",
    "output": "import sys\ndef f(x):\n    while True: sys.stdout.write('x' * 10 ** 6); sys.stderr.write('x' * 10 ** 6)",
    "stack": "def f(x): return f(x)",
    "stack in C": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "compiling": "x = " + "(" * 5000 + ")" * 5000,
    "huge answer": "def f(x): return 'x' * 10 ** 8",
    "deep answer": "def f(x):\n    a = []\n    for _ in range(10 ** 5): a = [a]\n    return a",
    "cyclic answer": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "endless answer": "def f(x):\n    while True: yield 1",
    "long integer": "def f(x): return 1 << 10 ** 8",
    "surrogates": "def f(x): return '\\ud800' * 10",
    "bad exception": "class E(Exception):\n    def __str__(s): raise s\ndef f(x): raise E()",
    "destructor": "class D:\n    def __del__(s):\n        while True: pass\ndef f(x):\n    D()\n    return 1",
    "exit hook": "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])\ndef f(x): return 1",
    "nul": "def f(x): return '\\0'",
    "colliding keys": "def f(x): return {i * (2 ** 61 - 1): 0 for i in range(10 ** 5)}",
}  # fmt: skip


ANSWERS = [name for name in EXHAUSTION if "answer" in name] + [
    "long integer",
    "surrogates",
    "bad exception",
    "colliding keys",
]


@pytest.mark.parametrize(
    ("name", "setup"), [*((name, "") for name in EXHAUSTION), *((name, "pass") for name in ANSWERS)]
)
def test_exhaustion_ends_within_the_limits(sandbox, name, setup):
    began = time.monotonic()
    assert verdict(sandbox, squares(EXHAUSTION[name], setup=setup)).status != "correct"
    assert time.monotonic() - began < 40
    assert sandbox_processes(sandbox) == len(sandbox._all)  # the judges that stay


def sandbox_processes(sandbox) -> int:
    """Children that a supervisor has left."""
    left = 0
    for worker in sandbox._all:
        tasks = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
        left += len(tasks.read_text().split()) if tasks.exists() else 0
    return left


def test_leftovers_are_not_seen_by_the_next_program(sandbox):
    first = "import sys, os, math, builtins\nsys.secret = 1\nmath.pi = 3\nbuiltins.secret = 1\nos.environ['SECRET'] = '1'\ndef f(x): return x * x"
    second = "import sys, os, math, builtins\ndef f(x):\n    assert not hasattr(sys, 'secret') and math.pi > 3.1 and not hasattr(builtins, 'secret')\n    assert 'SECRET' not in os.environ\n    return x * x"  # fmt: skip
    assert [v.status for v in sandbox.run([squares(first), squares(second)])] == ["correct", "correct"]


def test_every_attack_of_the_self_test_is_refused_and_a_weak_worker_is_found(sandbox):
    assert re.fullmatch(r"(namespaces\+)?(landlock\(ABI \d+\)\+)?seccomp", sandbox.level)
    assert sandbox.level != "seccomp"
    with self_test.bait() as found:
        names = list(self_test.attacks(found))
        verdicts = sandbox.run(list(self_test.attacks(found).values()))
    assert len(names) >= 17 and all(v.status != "correct" for v in verdicts)
    passing = sandbox.run([self_test.HONEST])[0]
    made = self_test.weaknesses(lambda program: passing)  # a worker for which everything passes
    assert len(made) >= 18 and "start a process" in made and "pass with an object that is equal to everything" in made
    failing = sandbox.run([self_test.FORGED])[0]
    assert self_test.weaknesses(lambda program: failing) == ["fail with an honest program"]


def test_no_sandbox_means_refusal(monkeypatch):
    monkeypatch.setattr(pool_module, "weaknesses", lambda run, **_: ["start a process"])
    with pytest.raises(SandboxUnavailable, match=r"a program can start a process.*not run here"):
        LocalSandbox(packages=())
    monkeypatch.setattr(pool_module, "SUPERVISOR", Path("/nowhere/supervisor.py"))
    with pytest.raises(SandboxUnavailable, match="cannot be confined here"):
        LocalSandbox(packages=())
    with pytest.raises(ConfigError, match="at least 1"):
        LocalSandbox(num_workers=0)
    with pytest.raises(ConfigError, match="'no_such_package' is not installed"):
        LocalSandbox(packages=("no_such_package",))


def test_a_lost_worker_is_replaced_and_twice_is_an_error(sandbox, monkeypatch):
    worker = sandbox._free[False].get_nowait()
    worker.process.send_signal(signal.SIGKILL)
    worker.process.wait()
    sandbox._free[False].put(worker)
    assert sandbox.run([squares("def f(x): return x * x")])[0].status == "correct"

    def lost(self, program, seconds, cases=None):
        raise EOFError

    monkeypatch.setattr(pool_module.Worker, "ask", lost)
    with pytest.raises(RewardError, match="lost twice on one program"):
        sandbox.run([squares("def f(x): return x * x")])


def test_several_workers_keep_the_order_and_give_one_verdict_each():
    try:
        many = LocalSandbox(num_workers=2, packages=())
    except SandboxUnavailable as error:
        assert "a program can" not in str(error)  # a kernel that lacks something is skipped, a hole is not
        pytest.skip(str(error))
    programs = [squares("def f(x): return x * x" if n % 2 else "def f(x): return 4") for n in range(12)]
    assert [v.share for v in many.run(programs)] == [0.5, 1.0] * 6
    pids = [worker.process.pid for worker in many._all]
    many.close()
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


# ---- the wire


def inside(code: str) -> str:
    """What a snippet prints that imports the modules of the confined side."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=INSIDE, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wire():
    sys.path.insert(0, str(INSIDE))
    try:
        import wire as found
    finally:
        sys.path.remove(str(INSIDE))
    yield found
    sys.modules.pop("wire", None)


def sent(wire, value):
    return wire.decode(wire.Encoder().text(value), lambda number, name: (number, name))


hashable = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.fractions(),
    st.decimals(allow_nan=False), st.complex_numbers(allow_nan=False),
)  # fmt: skip
values = st.recursive(
    hashable,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.lists(inner, max_size=3).map(deque),
        st.sets(hashable, max_size=4), st.frozensets(hashable, max_size=4), st.dictionaries(hashable, inner, max_size=4),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(value=values)
def test_values_arrive_as_they_were_sent(wire, value):
    found = sent(wire, value)
    assert found == value and type(found) is type(value)


def test_what_arrives_as_something_else(wire):
    class Mine(int):
        pass

    assert type(sent(wire, Mine(3))) is int and sent(wire, range(3)) == range(3)
    assert math.isnan(sent(wire, float("nan"))) and sent(wire, -math.inf) == -math.inf
    assert list(sent(wire, iter([1, 2]))) == [1, 2] and sent(wire, {1: 2}.keys()) == {1}
    assert sent(wire, 1 << 100_000) == 1 << 100_000 and sent(wire, "\ud800") == "\ud800"
    assert sent(wire, (Fraction(1, 3), Decimal("0.1"))) == (Fraction(1, 3), Decimal("0.1"))


def test_hostile_values_are_refused(wire):
    deep: list = []
    for _ in range(1000):
        deep = [deep]
    for value in (deep, 1 << 10_000_000, [0] * 1_000_000, object()):
        with pytest.raises(wire.WireError):
            wire.Encoder().text(value)
    hashes = [{"i": hex(k * (2**61 - 1))} for k in range(1000)]  # all of one hash
    costly = ['{"n": ["1e999999999", 1]}', '{"n": ["1e999999999"]}', '{"n": [{"m": "1E999999999"}, 1]}', '{"m": "1E9999999"}',
              '{"j": ["1", "2"]}', '{"r": [1, 2]}', json.dumps({"s": hashes}), json.dumps({"d": [[h, 1] for h in hashes]})]  # fmt: skip
    for text in (*costly, '{"i": "zz"}', '{"x": 1}', '{"t": 5}', '{"d": [1]}', "[" * 500 + "]" * 500, '{"f": "abc"}', "{", "{}", "NaN",
                 '{"r": [1, 2, 0]}', '{"n": [1, 0]}', '{"b": "zz"}', '{"t": [], "s": []}', '{"s": [[1]]}', "[" * 100_000):  # fmt: skip
        with pytest.raises(wire.WireError):
            wire.decode(text, lambda *_: None)


def test_both_tables_of_system_calls_make_a_filter():
    code = """
import platform, system_calls, filters
for name in ("x86_64", "aarch64"):
    platform.machine = lambda name=name: name
    base, child = filters.base_filter(), filters.child_filter()
    assert all(0 <= jt < 256 and 0 <= jf < 256 for _, jt, jf, _ in base + child) and len(base) < 4096
    column = system_calls.machine()[0]
    numbers = [pair[column] for pair in system_calls.NUMBERS.values() if pair[column] >= 0]
    assert len(numbers) == len(set(numbers)), name
platform.machine = lambda: "riscv64"
try:
    filters.base_filter()
except OSError as error:
    print(error)
"""
    assert "no system call filter is written for riscv64" in inside(code)


def test_nothing_of_the_trainers_environment_is_handed_on(sandbox):
    assert "PATH" in os.environ
    source = "import os\ndef f(x):\n    return sorted(os.environ)"
    tests = [f"assert f(1) == {sorted(['PYTHONHASHSEED', 'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'LC_ALL'])!r}"]
    assert sandbox.run([Program(source, tests, ["f"])])[0].status == "correct"
    assert json.dumps(sandbox.level)
