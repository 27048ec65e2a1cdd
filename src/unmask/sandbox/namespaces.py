"""bubblewrap: workers in namespaces of their own. Whether they are is measured from outside, at every worker's start:
that a program has the name bwrap, and ends well, proves nothing."""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

NAMESPACES = ("user", "pid", "net", "mnt", "ipc")
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid


def bubblewrap() -> str | None:
    """The program, if there is one."""
    found = shutil.which("bwrap")
    return found and os.path.abspath(found)  # workers start elsewhere


def wrapped(program: str, command: Sequence[str], environment: Mapping[str, str], readable: Sequence[str]) -> list[str]:
    """The command, to be run where nothing exists but the readable paths: no other file, process, network or variable,
    nothing to be written to, no privilege."""
    words = [program, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    for path in sorted(path for path in readable if os.path.exists(path) and Path(path).parts[:2] != ("/", "dev")):
        words += ["--ro-bind", path, path]  # parents first, or they would hide what lies below
    words += ["--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
    for name, value in environment.items():
        words += ["--setenv", name, value]
    return [*words, "--", *command]


def ask_for_sender(link: socket.socket) -> None:
    """Have the kernel say, with the first message, which process has sent it. To be called before it is started."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


def sender_of(link: socket.socket) -> int:
    """The process that has sent what is to be read next, in our own numbers; the kernel's word, not the sender's.

    Raises: OSError, EOFError if nothing was sent.
    """
    part, ancillary, _, _ = link.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size), socket.MSG_PEEK)
    if not part:
        raise EOFError
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            link.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    raise OSError("the kernel does not say who has sent a message")


def shared(pid: int) -> list[str]:
    """Namespaces that a process has in common with this one, or of which that cannot be excluded."""
    found = []
    for name in NAMESPACES:
        try:
            own, other = (os.stat(f"/proc/{owner}/ns/{name}") for owner in ("self", pid))
            is_shared = (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino)
        except OSError:
            is_shared = True
        if is_shared:
            found.append(name)
    return found
