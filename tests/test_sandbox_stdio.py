"""Programs that read standard input: judged by what they print, each test in a process of its own."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from tests.test_code import fenced, make
from tests.test_sandbox import inside, sandbox_processes
from unmask.cli import main
from unmask.errors import DataError
from unmask.sandbox import streams
from unmask.sandbox.verdicts import Limits, Program
from unmask.tasks import TASKS
from unmask.tasks.stdio import ASKS

QUICK = Limits(cpu=2.0, wall=8.0)
INPUTS, OUTPUTS = ["2\n3 4\n", "3\n1 1 1\n"], ["7\n", "3\n"]
ADDS = "n = int(input())\nprint(sum(map(int, input().split())))\n"


def adding(source: str, **settings) -> Program:
    return Program(source, OUTPUTS, [], **({"stdin": INPUTS, "limits": QUICK} | settings))


def verdict(sandbox, program):
    """Of a program, and then of an honest one: nothing may stay behind."""
    found = sandbox.run([program])[0]
    assert sandbox.run([adding(ADDS)])[0].status == "correct"
    assert sandbox_processes(sandbox) == len(sandbox._all)
    return found


HONEST = {
    "input": ADDS,
    "read at once": "import sys\nd = sys.stdin.read().split()\nprint(sum(map(int, d[1:])))",
    "bytes": "import sys\nd = sys.stdin.buffer.readlines()\nsys.stdout.buffer.write(b'%d' % sum(map(int, d[1].split())))",
    "descriptors": "import os\nd = os.read(0, 99).split()\nos.write(1, str(sum(map(int, d[1:]))).encode())",
    "open(0)": "d = open(0).read().split()\nprint(sum(map(int, d[1:])))",
    "main guard": "def main():\n    input()\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "exit": "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.exit()",
    "exit hook": "import atexit, io, sys\nout = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(out.getvalue()))\ninput()\nprint(sum(map(int, input().split())), file=out)",
    "replaced stream": "import io, os, sys\nsys.stdin = io.BytesIO(os.read(0, 99))\ninput = lambda: sys.stdin.readline().decode()\ninput()\nprint(sum(map(int, input().split())))",
    "thread": "import sys, threading\ndef main():\n    input()\n    print(sum(map(int, input().split())))\nsys.setrecursionlimit(10 ** 6)\nthreading.Thread(target=main).start()",
    "white space": "input()\nprint(sum(map(int, input().split())), '  \\r\\n\\n\\n')",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ninput()\nprint(A(sum(map(int, input().split()))).x)",
    "numpy": "import numpy as np\ninput()\nprint(np.array(input().split(), dtype=int).sum())",
    "on the other stream": "import sys\ninput()\nprint(sum(map(int, input().split())))\nprint('x' * 10 ** 6, file=sys.stderr)",
    "global state": "seen = globals().get('seen', 0) + 1\nassert seen == 1\n" + ADDS,
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(sandbox, name):
    found = sandbox.run([adding(HONEST[name], limits=Limits(cpu=5, wall=20))])[0]
    assert (found.status, found.passed) == ("correct", (True, True)), found


VERDICTS = {
    "print(7)": ("wrong", (True, False), "test 2: another output from line 1 on"),
    "": ("wrong", (False, False), "test 1: another output from line 1 on"),
    ADDS + "print()\nprint(1)": ("wrong", (False, False), "test 1: another output from line 2 on"),
    "print()\n" + ADDS: ("wrong", (False, False), "test 1: another output from line 1 on"),
    ADDS + "raise SystemExit(3)": ("wrong", (False, False), "test 1: exit status 3"),
    ADDS + "1 / 0": ("wrong", (False, False), "test 1: exit status 1"),
    "print(": ("error", (False, False), "test 1: exit status 95"),
    ADDS + "import ctypes\nctypes.string_at(0)": ("error", (False, False), "test 1: killed by signal 11"),
    "x = bytearray(10 ** 10)": ("out_of_memory", (False, False), "test 1: exit status 94"),
    "import os\nos.fork()": ("forbidden", (False,), "test 1: killed by signal 31"),
    "if input() == '2': print(7)\nwhile True: pass": ("timeout", (False,), "test 1: killed by signal 9"),
}


@pytest.mark.parametrize("source", VERDICTS)
def test_verdicts(sandbox, source):
    found = verdict(sandbox, adding(source, limits=Limits(cpu=1.0, wall=3.0)))
    assert (found.status, found.passed, found.reason) == VERDICTS[source]
    assert found.num_tests == 2


def test_tests_share_the_time_of_a_program(sandbox):
    half = ADDS + "import time\nend = time.process_time() + 0.35\nwhile time.process_time() < end: pass\n"
    limits = Limits(cpu=1.0, wall=20)
    found = verdict(sandbox, Program(half, OUTPUTS * 4, [], stdin=INPUTS * 4, limits=limits))
    assert found.status == "timeout" and found.passed[:2] == (True, True) and len(found.passed) < 8


@pytest.mark.parametrize(("seconds", "num_passed"), [(2, 7), (0.5, 20), (40, 5)])
def test_they_share_its_time_on_the_clock(monkeypatch, seconds, num_passed):
    """With 3 seconds each, all 20 have 2 · 3 + 20 / 2 less the last one's 3. What a worker that is lost takes beyond
    the 3 is not the program's."""
    now = [0.0]

    def ask(one):
        now[0] += seconds
        return {"judge": {"passed": [True]}, "candidate": dict(signal=0, exit=0, cpu=0.0, memory=1), "ended": "done"}

    monkeypatch.setattr(streams, "time", SimpleNamespace(monotonic=lambda: now[0]))
    program = Program("", ["7"] * 20, [], stdin=["2"] * 20, limits=Limits(cpu=1.0, wall=3.0))
    found = streams.run_tests(ask, program)
    assert found.passed == (True,) * num_passed and streams.longest(program) == 16.0
    if num_passed < 20:
        assert (found.status, found.reason) == ("timeout", "no time on the clock is left")


HOSTILE = {
    "endless output": "while True: print('x' * 10 ** 5)",
    "much output": "print('x' * (2 << 20))",
    "closed output": "import os\nos.close(1)",
    "sleeps": "import time\ntime.sleep(60)",
    "never reads": "print(7)",
    "stops reading": "import os\nos.close(0)\nprint(3)",
    "success words": "import os, json, struct\nm = json.dumps({'loaded': True, 'passed': [True]}).encode()\nfor d in range(64):\n    try: os.write(d, struct.pack('=I', len(m)) + m)\n    except OSError: pass\nos._exit(0)",
    "looks for the expected output": "import gc, os, sys\ninput()\nfor d in range(3, 64):\n    try: print(os.read(d, 99))\n    except OSError: pass\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'output' in o: print(o['output'])",
    "odd bytes": "import os\nos.write(1, bytes(range(256)) * 10)",
    "surrogates": "print('\\ud800')",
    "many threads": "import threading, time\nfor _ in range(10 ** 5): threading.Thread(target=time.sleep, args=(99,)).start()",
    "thread that stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=False).start()",
    "exit hook that stays": "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])",
    "odd exit": "class E(SystemExit):\n    code = property(lambda s: 1 / 0)\nraise E",
    "swallows what follows": "'''",
    "writes the input end": "import os\nos.write(0, b'7')",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_pass_nothing_more_and_leave_nothing(sandbox, name):
    began = time.monotonic()
    found = verdict(sandbox, adding(HOSTILE[name], limits=Limits(cpu=1.0, wall=2.0)))
    assert found.status != "correct" and sum(found.passed) <= 1
    assert time.monotonic() - began < 30


def test_large_inputs_and_outputs(sandbox):
    text = "".join(f"{number}\n" for number in range(100_000))
    copies = "import sys\nsys.stdout.write(sys.stdin.read())"
    program = Program(copies, [text, ""], [], stdin=[text, ""], limits=Limits(cpu=5, wall=30))
    assert sandbox.run([program])[0].status == "correct"
    line_by_line = "import sys\nfor line in sys.stdin:\n    print(int(line), flush=True)"
    few = "".join(f"{number}\n" for number in range(3_000))
    program = Program(line_by_line, [few], [], stdin=[few], limits=Limits(cpu=5, wall=30))
    assert sandbox.run([program])[0].status == "correct"


def test_both_sides_name_the_same_exit_statuses():
    found = inside("import stdio; print(stdio.NO_MEMORY, stdio.NO_PYTHON)")
    assert found.split() == [str(streams.NO_MEMORY), str(streams.NO_PYTHON)]
    code = "import stdio; print([stdio.difference(*p) for p in (('a \\n', 'a'), ('a\\n\\n', 'a'), (' a', 'a'), ('', '\\n'), ('a\\nb', 'a'), ('a b', 'a  b'))])"
    same, other = "''", "'another output from line {} on'"
    assert inside(code).strip() == f"[{same}, {same}, {other.format(1)}, {same}, {other.format(2)}, {other.format(1)}]"


# ---- rows

ROW = {"id": 7, "question": "Add them.\n", "inputs": INPUTS, "outputs": OUTPUTS, "solution": ADDS}


def test_rows_of_both_forms(tmp_path, sandbox):
    apps = {"problem_id": 8, "question": "Add them.", "solutions": json.dumps([ADDS, "x"])}
    apps["input_output"] = json.dumps({"inputs": [INPUTS[0].splitlines(), INPUTS[1]], "outputs": OUTPUTS})
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(ROW)}\n{json.dumps(apps)}\n")
    task = make(file, sandbox, reward="tests")
    examples = task.examples("test")
    assert [e.columns["task_id"] for e in examples] == ["7", "8"]
    assert [e.prompt[-1]["content"] for e in examples] == [f"Add them.\n\n{ASKS}"] * 2
    assert [e.columns["solution"] for e in examples] == [ADDS, ADDS]
    assert [s.value for s in task.score_all(examples, [fenced(ADDS)] * 2)] == [1.0, 1.0]
    assert [s.value for s in task.score_all(examples, [fenced("print(7)"), "none"])] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": []}, "2 inputs and 0 outputs"),
        ({"outputs": ["\n", ""]}, "all outputs are blank"),
        ({"inputs": [], "outputs": []}, "0 inputs and 0 outputs"),
        ({"inputs": [1, 2]}, "is a int"),
        ({"input_output": "{"}, "is no"),
        ({"input_output": "[]"}, "holds no inputs"),
        ({"input_output": json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [1]})}, "calls a function"),
        ({"question": None}, "is no"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, capsys, change, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | change) + "\n")
    with pytest.raises(DataError, match=f"line 2: is no row of code .*{message}|line 2: {message}"):
        TASKS["code"](data=str(file)).examples("test")
    assert main(["data", "check", str(file)]) == 2
    said = capsys.readouterr()
    assert "programs judged by what they print" in said.out and "line 2" in said.out + said.err


def test_data_check_reads_them(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    assert main(["data", "check", str(file)]) == 0
    said = capsys.readouterr().out
    assert "programs judged by what they print" in said and "solution" in said and "Add them." in said
