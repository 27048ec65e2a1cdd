"""The local sandbox: a few workers, each a confined process that forks a candidate and a judge for every program."""

from __future__ import annotations

import array
import atexit
import json
import os
import queue
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.sandbox import streams
from unmask.sandbox.literal import literal_cases
from unmask.sandbox.namespaces import ask_for_sender, bubblewrap, sender_of, shared, wrapped
from unmask.sandbox.self_test import weaknesses
from unmask.sandbox.verdicts import Limits, LostWorker, Program, Verdict, classify

SUPERVISOR = Path(__file__).parent / "inside" / "supervisor.py"
LIGHT = [
    "collections", "heapq", "bisect", "itertools", "functools", "operator", "math", "cmath", "re", "string", "decimal",
    "fractions", "typing", "copy", "json", "abc", "array", "time", "datetime",
]  # fmt: skip
"""Loaded by every worker."""
HEAVY = [
    "random", "statistics", "dataclasses", "enum", "hashlib", "calendar", "textwrap", "uuid", "zlib",
    "base64", "asyncio", "threading", "queue", "contextlib", "traceback", "difflib", "unittest",
]  # fmt: skip
"""Loaded, as packages are, by workers for programs that import one of them: memory is what a fork costs."""
PROGRAMS_PER_WORKER = 1_000
_IMPORTED = re.compile(r"\b(?:import|from)\b([^\n;#]*)")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_MESSAGE = 8 << 20
"""Bytes of a judge."""
START_SECONDS = 30.0
LATE, MORE_TIME = 0.1, 4
"""A judge that has computed for this share of the wall time when that ends is given so many times as much, once."""


class SandboxUnavailable(ConfigError):
    """Programs cannot be confined, so none is run."""


@dataclass
class Worker:
    """One supervisor, the socket to it, and that to its judge of literal cases."""

    process: subprocess.Popen[bytes]
    link: socket.socket
    judge: socket.socket
    level: str
    is_heavy: bool
    served: int = 0

    def ask(self, program: Program, seconds: float, cases: bytes | None = None) -> dict[str, Any]:
        """How a program fared, with the tests as they are, or with the literal `cases` to which they come.

        Raises: OSError or EOFError if the worker is lost, or does not answer in time.
        """
        self.served += 1
        limits = {name: getattr(program.limits, name) for name in ("cpu", "wall", "memory", "judge_memory")}
        request = {"source": program.source, "limits": limits, "streams": program.stdin is not None}
        content = json.dumps(request).encode()
        return self._ask(program, content, seconds) if cases is None else self._ask_cases(cases, content, seconds)

    def _ask_cases(self, cases: bytes, request: bytes, seconds: float) -> dict[str, Any]:
        for link, content in ((self.judge, cases), (self.link, request)):
            link.settimeout(seconds)
            link.sendall(struct.pack("=I", len(content)) + content)
        return receive(self.link) | {"judge": receive(self.judge)}

    def _ask(self, program: Program, request: bytes, seconds: float) -> dict[str, Any]:
        tests = json.dumps(tests_of(program))
        file, (reader, writer) = os.memfd_create("tests"), os.pipe()
        try:
            write_all(file, tests.encode())
            self.link.settimeout(seconds)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file, writer]))]
            self.link.sendmsg([struct.pack("=I", len(request))], rights)
            os.close(writer)
            writer = -1
            self.link.sendall(request)
            said = read_all(reader, seconds)
            return receive(self.link) | {"judge": verdict_of(said)}
        finally:
            for descriptor in (file, reader, writer):
                if descriptor >= 0:
                    os.close(descriptor)

    def stop(self) -> None:
        self.link.close()
        self.judge.close()
        self.process.kill()
        self.process.wait()


@dataclass
class LocalSandbox:
    """Runs programs here. `packages` (such as numpy) can be imported by programs and tests.

    In namespaces if bubblewrap is there and passes the self-test, else by Landlock. `passed_over` says why not.
    Raises: SandboxUnavailable if no level of confinement works on this machine.
    """

    num_workers: int = 1
    packages: tuple[str, ...] = ("numpy",)

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"{self.num_workers} sandbox workers: at least 1 is needed.")
        self._free: dict[bool, queue.Queue[Worker]] = {False: queue.Queue(), True: queue.Queue()}
        self._lock = threading.Lock()
        self._all: list[Worker] = []
        self.passed_over: list[str] = []
        self._wrapper: str | None = None
        for wrapper in dict.fromkeys((bubblewrap(), None)):
            self._wrapper = wrapper
            try:
                self._open()
            except SandboxUnavailable as error:
                self.close()
                self.passed_over.append(str(error))
            else:
                atexit.register(self.close)
                return
        raise SandboxUnavailable(f"{' '.join(self.passed_over)} Programs are not run here; use a remote sandbox.")

    def _open(self) -> None:
        """Start the first worker, and have it attack itself. Raises: SandboxUnavailable."""
        first, in_namespaces = self._start(is_heavy=False), self._wrapper is not None
        self.level = first.level
        try:
            made = weaknesses(
                lambda p: classify(first.ask(p, START_SECONDS, literal_cases(p)), p), in_namespaces=in_namespaces
            )
        except (OSError, EOFError):
            made = ["end the process that confines it"]
        if made:
            raise SandboxUnavailable(f"at the level {self.level} a program can {', '.join(made)}.")
        self._free[False].put(first)

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        """A verdict for each program, in their order. Raises: LostWorker if that happens twice on one program."""
        with ThreadPoolExecutor(self.num_workers) as threads:
            return list(threads.map(self.run_one, programs))

    def run_one(self, program: Program) -> Verdict:
        """A verdict, by whichever worker is free. Raises: LostWorker, BrokenTests."""
        if program.stdin is not None:
            return streams.run_tests(lambda one: self._ask(one, None), program)
        answer = self._ask(program, literal_cases(program))
        if judge_was_late(answer, program.limits):
            more = replace(program.limits, wall=MORE_TIME * program.limits.wall)
            answer = self._ask(replace(program, limits=more), None)
        return classify(answer, program)

    def close(self) -> None:
        """Stop all workers."""
        with self._lock:
            for worker in self._all:
                worker.stop()
            self._all.clear()
            self._free = {False: queue.Queue(), True: queue.Queue()}

    def _ask(self, program: Program, literal: bytes | None) -> dict[str, Any]:
        """From a worker, and another one if that is lost."""
        for cases in (literal, None):  # whatever befell the judge that stays, the other has not seen
            texts = [program.source, *([program.setup, program.helpers, *program.tests] if cases is None else [])]
            worker = self._take(is_heavy=imports_any({*HEAVY, *self.packages}, texts))
            try:
                answer = worker.ask(program, program.limits.wall + START_SECONDS, cases)
            except (OSError, EOFError, ValueError):
                self._drop(worker)
                continue
            if worker.served >= PROGRAMS_PER_WORKER:
                self._drop(worker)
            else:
                self._free[worker.is_heavy].put(worker)
            return answer
        raise LostWorker(
            f"a sandbox worker was lost twice on one program (begins {program.source[:40]!r}). Look at free memory."
        )

    def _take(self, *, is_heavy: bool) -> Worker:
        try:
            return self._free[is_heavy].get_nowait()
        except queue.Empty:
            return self._start(is_heavy=is_heavy)

    def _start(self, *, is_heavy: bool) -> Worker:
        worker = start_worker(self.packages, is_heavy=is_heavy, wrapper=self._wrapper)
        with self._lock:
            self._all.append(worker)
        return worker

    def _drop(self, worker: Worker) -> None:
        with self._lock:
            if worker in self._all:
                self._all.remove(worker)
        worker.stop()


def tests_of(program: Program) -> dict[str, Any]:
    """What the judge reads: of a program that reads standard input, its one test."""
    if program.stdin is not None:
        (given,), (expected,) = program.stdin, program.tests
        return {"input": given, "output": expected}
    return {
        "tests": list(program.tests),
        "names": list(program.names),
        "setup": program.setup,
        "helpers": program.helpers,
        "copies_back": program.copies_back,
    }


def judge_was_late(answer: dict[str, Any], limits: Limits) -> bool:
    """Whether the clock ran out while the tests computed rather than the program, which is then not to blame."""
    busy = answer.get("tester", {}).get("cpu", 0.0)
    return answer["ended"] == "wall" and busy >= max(LATE * limits.wall, answer["candidate"]["cpu"])


def longest(program: Program) -> float:
    """Seconds after which a verdict is there or given up: twice two workers, which may have to be started."""
    wall = (1 + MORE_TIME) * program.limits.wall if program.stdin is None else streams.longest(program)
    return 2 * wall + 8 * START_SECONDS


def imports_any(modules: Set[str], texts: Sequence[str]) -> bool:
    """Whether an import statement of the texts has the name of a module. A mistake costs time, and nothing else."""
    return any(modules & set(_WORD.findall(rest)) for text in texts for rest in _IMPORTED.findall(text))


def start_worker(packages: Sequence[str], *, is_heavy: bool, wrapper: str | None) -> Worker:
    """A supervisor that is confined and has said so; `wrapper`, bubblewrap, has put it into namespaces of its own.

    Raises: SandboxUnavailable with what the kernel said.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"programs are confined on Linux alone, this is {sys.platform}. Use a remote sandbox.")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    folders = package_folders(packages)
    readable = readable_paths(folders)
    settings = {
        "readable": readable,
        "packages": folders,
        "preload": [*LIGHT, *([*HEAVY, *packages] if is_heavy else [])],
        "memory": Limits.judge_memory,
        "in_namespaces": wrapper is not None,
    }
    sockets = [theirs.fileno(), far.fileno()]
    command = [base_python(), "-s", "-S", "-B", "-P", str(SUPERVISOR), *map(str, sockets), json.dumps(settings)]
    environment = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    if wrapper is not None:
        command = wrapped(wrapper, command, environment, readable)
        ask_for_sender(ours)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=sockets,
        start_new_session=True,
        cwd="/",
    )
    theirs.close()
    far.close()
    ours.settimeout(START_SECONDS)
    try:
        common = shared(sender_of(ours)) if wrapper is not None else []
        ready = receive(ours)
    except (OSError, EOFError) as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it may have started would keep its words from ending
        _, said = process.communicate()
        ours.close()
        near.close()
        last = said.decode(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
        if wrapper is not None:
            raise SandboxUnavailable(f"{wrapper} confines nothing here ({last[0][:200]}).") from error
        raise SandboxUnavailable(
            f"programs cannot be confined here ({last[0][:200]}). Landlock needs Linux 5.13 or later with landlock in "
            "its list of security modules, seccomp x86_64 or aarch64. `unmask doctor` says what is missing."
        ) from error
    assert process.stderr is not None
    process.stderr.close()
    worker = Worker(process, ours, near, ("namespaces+" if wrapper else "") + ready["ready"], is_heavy)
    if common:
        worker.stop()
        raise SandboxUnavailable(f"{wrapper} leaves programs in namespaces of this process ({', '.join(common)}).")
    return worker


def base_python() -> str:
    """The interpreter behind a virtual environment: its folder is all that it needs to read."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def package_folders(packages: Sequence[str]) -> list[str]:
    """Where the packages lie: folders for the search path of programs. Raises: ConfigError for one that is missing."""
    folders = []
    for name in packages:
        for folder in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
            if (Path(folder) / name).is_dir():
                folders.append(str(folder))
                break
        else:
            raise ConfigError(f"sandbox package {name!r} is not installed here. Install it, or leave it out.")
    return list(dict.fromkeys(folders))


def readable_paths(folders: Sequence[str]) -> list[str]:
    """What a program may read: the interpreter, the system's libraries, the packages, this package's own files."""
    base = Path(base_python()).parents[1]
    system = [
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/etc/ld.so.cache",
        "/usr/share/zoneinfo",
        "/dev/null",
        "/dev/urandom",
    ]
    python = [str(base / "lib"), str(base / "bin"), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    return list(dict.fromkeys([*system, *python, *folders, str(SUPERVISOR.parent)]))


def write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def read_all(descriptor: int, seconds: float) -> bytes:
    """What a judge writes until it has gone. Raises: EOFError if it takes longer, or writes more than a message."""
    content, end = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        if not ready or len(content) > MAX_MESSAGE:
            raise EOFError
        part = os.read(descriptor, 1 << 16)
        if not part:
            return content
        content += part


def verdict_of(content: bytes) -> dict[str, Any] | None:
    """What the judge said; None if it did not finish."""
    if len(content) < 4 or len(content) != 4 + struct.unpack("=I", content[:4])[0]:
        return None
    found = json.loads(content[4:])
    return found if isinstance(found, dict) else None


def receive(link: socket.socket) -> dict[str, Any]:
    """One message. Raises: OSError or EOFError."""
    (length,) = struct.unpack("=I", _exactly(link, 4))
    found = json.loads(_exactly(link, length))
    if not isinstance(found, dict):
        raise EOFError
    return found


def _exactly(link: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        part = link.recv(count - len(content))
        if not part:
            raise EOFError
        content += part
    return content
