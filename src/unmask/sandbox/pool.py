"""The local sandbox: a few workers, each a confined process that forks a candidate and a judge for every program."""

from __future__ import annotations

import array
import atexit
import json
import os
import queue
import select
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, RewardError
from unmask.sandbox.self_test import weaknesses
from unmask.sandbox.verdicts import Program, Verdict, classify

SUPERVISOR = Path(__file__).parent / "inside" / "supervisor.py"
PRELOAD = [
    "collections", "heapq", "bisect", "itertools", "functools", "operator", "math", "cmath", "random", "re",
    "string", "datetime", "decimal", "fractions", "statistics", "typing", "dataclasses", "enum", "copy", "json",
    "hashlib", "abc", "array", "calendar", "textwrap", "time", "uuid", "zlib", "base64", "asyncio", "threading",
    "queue", "contextlib", "traceback", "difflib", "unittest",
]  # fmt: skip
PROGRAMS_PER_WORKER = 1_000
MAX_MESSAGE = 8 << 20
"""Bytes of a judge."""
START_SECONDS = 30.0


class SandboxUnavailable(ConfigError):
    """Programs cannot be confined on this machine, so none is run."""


@dataclass
class Worker:
    """One supervisor and the socket to it."""

    process: subprocess.Popen[bytes]
    link: socket.socket
    level: str
    served: int = 0

    def ask(self, program: Program, seconds: float) -> dict[str, Any]:
        """Raises: OSError or EOFError if the worker is lost, or does not answer in time."""
        tests = json.dumps(
            {
                "tests": list(program.tests),
                "names": list(program.names),
                "setup": program.setup,
                "helpers": program.helpers,
            }
        )
        limits = {name: getattr(program.limits, name) for name in ("cpu", "wall", "memory", "judge_memory")}
        request = json.dumps({"source": program.source, "limits": limits}).encode()
        file, (reader, writer) = os.memfd_create("tests"), os.pipe()
        try:
            write_all(file, tests.encode())
            self.link.settimeout(seconds)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file, writer]))]
            self.link.sendmsg([struct.pack("=I", len(request))], rights)
            os.close(writer)
            writer = -1
            self.link.sendall(request)
            self.served += 1
            said = read_all(reader, seconds)
            return receive(self.link) | {"judge": verdict_of(said)}
        finally:
            for descriptor in (file, reader, writer):
                if descriptor >= 0:
                    os.close(descriptor)

    def stop(self) -> None:
        self.link.close()
        self.process.kill()
        self.process.wait()


@dataclass
class LocalSandbox:
    """Runs programs here. `packages` (such as numpy) can be imported by programs and tests.

    Raises: SandboxUnavailable if no level of confinement works on this machine.
    """

    num_workers: int = 1
    packages: tuple[str, ...] = ("numpy",)

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"{self.num_workers} sandbox workers: at least 1 is needed.")
        self._free: queue.Queue[Worker] = queue.Queue()
        self._lock = threading.Lock()
        self._all: list[Worker] = []
        first = self._start()
        self.level = first.level
        try:
            made = weaknesses(lambda program: classify(first.ask(program, START_SECONDS), program))
        except (OSError, EOFError):
            made = ["end the process that confines it"]
        if made:
            self.close()
            raise SandboxUnavailable(
                f"at the level {self.level} a program can {', '.join(made)}. Programs are not run here; use a remote "
                "sandbox."
            )
        self._free.put(first)
        atexit.register(self.close)

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        """A verdict for each program, in their order. Raises: RewardError if a worker is lost twice on one program."""
        with ThreadPoolExecutor(self.num_workers) as threads:
            return list(threads.map(self._run_one, programs))

    def close(self) -> None:
        """Stop all workers."""
        with self._lock:
            for worker in self._all:
                worker.stop()
            self._all.clear()
            self._free = queue.Queue()

    def _run_one(self, program: Program) -> Verdict:
        for _ in range(2):
            worker = self._take()
            try:
                answer = worker.ask(program, program.limits.wall + START_SECONDS)
            except (OSError, EOFError, ValueError):
                self._drop(worker)
                continue
            if worker.served >= PROGRAMS_PER_WORKER:
                self._drop(worker)
            else:
                self._free.put(worker)
            return classify(answer, program)
        raise RewardError(
            f"a sandbox worker was lost twice on one program (begins {program.source[:40]!r}). Look at free memory."
        )

    def _take(self) -> Worker:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return self._start()

    def _start(self) -> Worker:
        worker = start_worker(self.packages)
        with self._lock:
            self._all.append(worker)
        return worker

    def _drop(self, worker: Worker) -> None:
        with self._lock:
            if worker in self._all:
                self._all.remove(worker)
        worker.stop()


def start_worker(packages: Sequence[str]) -> Worker:
    """A supervisor that is confined and has said so. Raises: SandboxUnavailable with what the kernel said."""
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"programs are confined on Linux alone, this is {sys.platform}. Use a remote sandbox.")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    folders = package_folders(packages)
    settings = {
        "readable": readable_paths(folders),
        "packages": folders,
        "preload": [*PRELOAD, *packages],
    }
    command = [base_python(), "-s", "-S", "-B", "-P", str(SUPERVISOR), str(theirs.fileno()), json.dumps(settings)]
    environment = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        cwd="/",
    )
    theirs.close()
    ours.settimeout(START_SECONDS)
    try:
        ready = receive(ours)
    except (OSError, EOFError) as error:
        process.kill()
        _, said = process.communicate()
        ours.close()
        last = said.decode(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
        raise SandboxUnavailable(
            f"programs cannot be confined here ({last[0][:200]}). Landlock needs Linux 5.13 or later with landlock in "
            "its list of security modules, seccomp x86_64 or aarch64. `unmask doctor` says what is missing."
        ) from error
    assert process.stderr is not None
    process.stderr.close()
    return Worker(process, ours, ready["ready"])


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
