"""Attacks that a worker makes on itself before it is trusted, an honest program that must pass and a forged one that
must not. Each attack returns "done" if it succeeded; whatever else happens to it is as it should be."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from unmask.sandbox.verdicts import Limits, Program, Verdict
from unmask.types import Status

CANARY = "UNMASK_SANDBOX_CANARY"
_HEAD = "import os, socket, signal, resource, ctypes, mmap\n"

ATTACKS = {
    "read the trainer's environment": "return 'done' if {canary!r} in str(dict(os.environ)) else ''",
    "read a file of the user": "return 'done' if {canary!r} in open({file!r}).read() else ''",
    "list a folder of the user": "return 'done' if os.listdir({folder!r}) else ''",
    "connect by TCP": "socket.create_connection(('127.0.0.1', {port}), 1); return 'done'",
    "send by UDP": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port})); return 'done'",
    "connect to a socket file": "s = socket.socket(socket.AF_UNIX); s.connect({socket!r}); return 'done'",
    "connect to an abstract socket": "s = socket.socket(socket.AF_UNIX); s.connect({abstract!r}); return 'done'",
    "create a file": "open({folder!r} + '/new', 'w').close(); return 'done'",
    "empty a file": "os.truncate({file!r}, 0); return 'done'",
    "change a file's mode": "os.chmod({file!r}, 0o777); return 'done'",
    "remove a file": "os.unlink({file!r}); return 'done'",
    "start a process": "os.fork(); return 'done'",
    "run another program": "os.execv('/bin/true', ['true']); return 'done'",
    "signal its parent": "os.kill(os.getppid(), signal.SIGCONT); return 'done'",
    "signal its parent by way of a socket": (
        "import fcntl; a, b = socket.socketpair(); fcntl.fcntl(a, 8, os.getppid()); return 'done'"
    ),
    "trace its parent": "return 'done' if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0 else ''",
    "raise a limit": "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); return 'done'",
    "use /dev/shm": "os.open('/dev/shm/unmask', os.O_CREAT | os.O_RDWR); return 'done'",
}
_OLD_CALLS = """
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('b814000000cd80c3'))
entry = ctypes.addressof(ctypes.c_char.from_buffer(code))
return 'done' if ctypes.CFUNCTYPE(ctypes.c_int)(entry)() > 0 else ''
"""
"""getpid by the table of 32-bit programs, which a filter for 64 bits alone would not see."""

IN_NAMESPACES = {"see the name of a user's file": "os.stat({file!r}); return 'done'"}
"""What is refused only where files that may not be read do not exist."""

HONEST = Program("def f(x):\n    return [x, x * x]\n", ["assert f(3) == [3, 9]"], ["f"])
FORGED = Program(
    "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x):\n    return Yes()\n",
    ["assert f(3) == [3, 9]"],
    ["f"],
)
_LIMITS = Limits(cpu=2.0, wall=10.0)


def executed(program: Program) -> Program:
    """The same with tests that count as more than literals, so that a judge of its own executes them."""
    return replace(program, setup="pass")


@dataclass(frozen=True)
class Bait:
    """Things on the trainer's side that no program may reach."""

    canary: str
    file: str
    folder: str
    socket: str
    abstract: str
    port: int


@contextmanager
def bait() -> Iterator[Bait]:
    """A file, an environment variable and listening sockets, there for as long as the test takes."""
    canary = secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "canary"
        file.write_text(canary)
        os.environ[CANARY] = canary
        addresses = (str(Path(folder) / "socket"), f"\0{canary}")
        with (
            socket.create_server(("127.0.0.1", 0)) as tcp,
            socket.socket(socket.AF_UNIX) as by_path,
            socket.socket(socket.AF_UNIX) as by_name,
        ):
            for listener, address in zip((by_path, by_name), addresses, strict=True):
                listener.bind(address)
                listener.listen()
            try:
                yield Bait(canary, str(file), folder, *addresses, tcp.getsockname()[1])
            finally:
                del os.environ[CANARY]


def num_attacks(*, in_namespaces: bool) -> int:
    """Attacks that this machine's self-test makes."""
    return len(ATTACKS) + _has_old_calls() + in_namespaces * len(IN_NAMESPACES)


def _has_old_calls() -> bool:
    return os.uname().machine == "x86_64"


def attacks(found: Bait, *, in_namespaces: bool = False) -> dict[str, Program]:
    """Programs by what they try. "done" would be the answer of one that succeeds."""
    chosen = ATTACKS | (IN_NAMESPACES if in_namespaces else {})
    bodies = {name: body.format(**vars(found)) for name, body in chosen.items()}
    if _has_old_calls():
        bodies["make a 32-bit system call"] = _OLD_CALLS.strip()
    return {
        name: Program(
            _HEAD + "def f():\n" + "".join(f"    {line}\n" for line in body.splitlines()),
            ["assert f() == 'done'"],
            ["f"],
            limits=_LIMITS,
        )
        for name, body in bodies.items()
    }


def weaknesses(run: Callable[[Program], Verdict], *, in_namespaces: bool = False) -> list[str]:
    """What a program can do that it must not; empty for a worker that may be trusted."""
    with bait() as found:
        tried = attacks(found, in_namespaces=in_namespaces)
        made = [name for name, program in tried.items() if run(program).status == Status.CORRECT]
        if Path(found.file).read_text() != found.canary:
            made.append("change a file of the user")
    if any(run(program).status == Status.CORRECT for program in (FORGED, executed(FORGED))):
        made.append("pass with an object that is equal to everything")
    if any(run(program).status != Status.CORRECT for program in (HONEST, executed(HONEST))):
        made.append("fail with an honest program")
    return made
