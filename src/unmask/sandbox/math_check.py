"""Mathematical equality of two LaTeX answers, in processes that are killed at a deadline.

Parsing and comparing hostile answers may take minutes and hold the interpreter's lock, which no thread can interrupt.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from unmask.errors import RewardError
from unmask.optional import optional

WORKER = Path(__file__).with_name("math_worker.py")
START_SECONDS = 60.0

MAX_CHARACTERS = 512
MAX_DIGITS = 30
MAX_DEPTH = 20
MAX_ELEMENTS = 100

_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1},}}")
_LARGE_EXPONENT = re.compile(r"\^\s*\{?\s*-?\s*[0-9]{5,}")
_STACKED_EXPONENT = re.compile(r"\^\s*\{[^{}]*\^|\^\s*[^\s{}]\s*\^")
_LARGE_FACTORIAL = re.compile(r"[0-9]{4,}\s*\}?\s*!")


def is_bounded(answer: str) -> bool:
    """Whether an answer is small enough to be parsed at all; one that is not is wrong."""
    if len(answer) > MAX_CHARACTERS or answer.count(",") > MAX_ELEMENTS:
        return False
    depth = deepest = 0
    for sign in answer:
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    patterns = (_LONG_NUMBER, _LARGE_EXPONENT, _STACKED_EXPONENT, _LARGE_FACTORIAL)
    return deepest <= MAX_DEPTH and not any(pattern.search(answer) for pattern in patterns)


@dataclass
class MathVerifier:
    """A pool of workers, started when first needed. Thread-safe: each caller has a worker for itself.

    Raises: ConfigError if math-verify is not installed; RewardError if a worker is lost twice in a row.
    """

    num_workers: int = 1
    deadline: float = 2.0
    """Wall seconds for one answer."""
    timeouts: int = 0
    """Answers that were not decided in time."""
    _free: queue.Queue[subprocess.Popen[bytes]] = field(default_factory=queue.Queue)
    _started: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def verify(self, gold: str, answer: str) -> str:
        """ "correct", "wrong" or "timeout"."""
        request = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
        for _ in range(2):
            with self._worker() as worker:
                found = self._ask(worker, request)
            if found == "timeout":
                self.timeouts += 1
            if found:
                return found
        raise RewardError("a process that checks mathematical answers died twice on one answer. Look at free memory.")

    @contextmanager
    def _worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """A worker for one question; put back if it lives, else another takes its place when it is needed."""
        with self._lock:
            may_start = self._free.empty() and self._started < self.num_workers
            self._started += may_start
        try:
            worker = start_worker() if may_start else self._free.get()
            if worker.poll() is not None:
                worker = start_worker()
        except Exception:
            with self._lock:
                self._started -= 1  # its place is free again
            raise
        try:
            yield worker
        finally:
            self._free.put(worker)

    def _ask(self, worker: subprocess.Popen[bytes], request: bytes) -> str:
        """The verdict; "timeout" with the worker killed; "" if it died by itself."""
        assert worker.stdin is not None
        try:
            worker.stdin.write(request)
            worker.stdin.flush()
        except OSError:
            return ""
        line = read_line(worker, self.deadline)
        if line is None:
            worker.kill()
            worker.wait()
            return "timeout"
        return str(json.loads(line)["verdict"]) if line else ""

    def close(self) -> None:
        """Kill the workers."""
        while not self._free.empty():
            stop(self._free.get())
        self._started = 0


def start_worker() -> subprocess.Popen[bytes]:
    """A worker that has answered once. Raises: RewardError if it does not come up."""
    optional("math_verify", "math")
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    worker = subprocess.Popen(
        [sys.executable, "-P", str(WORKER)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment
    )
    atexit.register(stop, worker)
    if not read_line(worker, START_SECONDS):
        stop(worker)
        raise RewardError(f"a process that checks mathematical answers did not start within {START_SECONDS:.0f} s.")
    return worker


def read_line(worker: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line of the worker; None if there is none in time, b"" at its end."""
    assert worker.stdout is not None
    found, end = b"", time.monotonic() + seconds
    while not found.endswith(b"\n"):
        ready, _, _ = select.select([worker.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        piece = os.read(worker.stdout.fileno(), 4096)
        if not piece:
            return b""
        found += piece
    return found


def stop(worker: subprocess.Popen[bytes]) -> None:
    """Kill a worker and close its pipes; again is harmless."""
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()
