"""Programs that the sandbox judges per second of CPU time, of all its processes and this one.

python benchmarks/sandbox.py --programs 400
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import machine, markdown_table

from unmask.sandbox.pool import LocalSandbox, SandboxUnavailable
from unmask.sandbox.self_test import executed
from unmask.sandbox.verdicts import Limits, Program, Verdict

TESTS = [f"assert f({n}) == [{n}, {n * n}]" for n in range(10)]
SOURCES = {
    "right": "def f(x):\n    return [x, x * x]\n",
    "wrong": "def f(x):\n    return [x, x + x]\n",
    "endless": "def f(x):\n    while True:\n        pass\n",
}
NUMPY = "import numpy as np\ndef f(x):\n    return [x, int(np.square(x))]\n"
EXPECTED = {"right": "correct", "wrong": "wrong", "endless": "timeout", "right, imports numpy": "correct"}
LIMITS = Limits(cpu=0.5, wall=5.0)
"""An endless program costs its limit, whatever the sandbox does."""


def cpu_seconds(pid: int) -> float:
    """Of a process and of its children, those that live and those that were waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in children)


def measure(sandbox: LocalSandbox, programs: Sequence[Program]) -> tuple[list[Verdict], float, float]:
    """Verdicts, seconds on the clock and of CPU. The workers are started before, and none is replaced meanwhile."""
    sandbox.run(programs[:1])
    pids = [worker.process.pid for worker in sandbox._all]
    own, others, began = time.process_time(), sum(map(cpu_seconds, pids)), time.perf_counter()
    verdicts = sandbox.run(programs)
    wall = time.perf_counter() - began
    cpu = time.process_time() - own + sum(map(cpu_seconds, pids)) - others
    if pids != [worker.process.pid for worker in sandbox._all]:
        raise SystemExit("a worker was replaced during the measurement; use fewer --programs.")
    return verdicts, wall, cpu


def rows(count: int) -> list[list[str]]:
    """One line for each kind of program and each judge. A new pool for each, so that no worker reaches its age."""
    found = []
    for label, expected in EXPECTED.items():
        program = Program(NUMPY if "numpy" in label else SOURCES[label], TESTS, ["f"], limits=LIMITS)
        for judge, asked in (("stays", program), ("forked, executes the tests", executed(program))):
            number = max(1, count // 20) if label == "endless" else count
            sandbox = LocalSandbox()
            try:
                verdicts, wall, cpu = measure(sandbox, [replace(asked) for _ in range(number)])
            finally:
                sandbox.close()
            right = sum(verdict.status == expected for verdict in verdicts)
            if right != number:
                raise SystemExit(f"{label}, judge that {judge}: {number - right} of {number} verdicts are wrong.")
            rate, each = f"{number / cpu:.0f}", f"{1000 * cpu / number:.1f}"
            found.append([label, judge, f"{right} of {number} {expected}", rate, each, f"{number / wall:.0f}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=400, help="of each kind, at most 900")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ["program", "judge", "verdicts", "programs per CPU second", "CPU ms each", "per second of the clock"]
    try:
        table = markdown_table(head, rows(options.programs))
    except SandboxUnavailable as error:
        raise SystemExit(f"not measured: {error}") from error
    print(machine(torch.device("cpu")) + "\n\n" + table)


if __name__ == "__main__":
    main()
