"""One worker: confines itself, then forks a candidate and a judge for every program that it is sent.

    python -s -S -B -P supervisor.py SOCKET {"readable": [...], "packages": [...], "preload": [...]}

The tests of a task come as a file descriptor that is only passed on, so that nothing this process has read can be found
by a later program. What is not trusted runs in children of this process alone.
"""

from __future__ import annotations

import array
import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import candidate
import filters
import judge
import landlock
from channel import send

POLL_SECONDS = 0.02


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    sys.path.extend(settings["packages"])
    preload(settings["preload"])
    os.chdir("/")
    version = landlock.restrict(settings["readable"])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # waited for, see watch()
    gc.collect()
    gc.freeze()
    filters.install(filters.base_filter())
    send(link.fileno(), json.dumps({"ready": f"landlock(ABI {version})+seccomp"}).encode())
    while True:
        request, tests, result = receive_task(link)
        answer = serve(request, tests, result)
        send(link.fileno(), json.dumps(answer).encode())
        del request, answer


def preload(names: list[str]) -> None:
    """Import what programs often want, so that children need not; what is missing is left out."""
    for name in names:
        try:
            __import__(name)
        except ImportError:
            continue


def receive_task(link: socket.socket) -> tuple[dict, int, int]:
    """The request, the descriptor of the tests, and that of a pipe to the trainer for what the judge says: neither is
    read here, where a later program might find it. Ends the process when the trainer has gone."""
    head, ancillary, _, _ = link.recvmsg(4, socket.CMSG_SPACE(8))
    if len(head) < 4:
        os._exit(0)
    (length,) = struct.unpack("=I", head)
    content = b""
    while len(content) < length:
        part = link.recv(length - len(content))
        if not part:
            os._exit(0)
        content += part
    descriptors = array.array("i")
    for _level, _type, data in ancillary:
        descriptors.frombytes(data[: len(data) - len(data) % 4])
    return json.loads(content), descriptors[0], descriptors[1]


def serve(request: dict, tests: int, result: int) -> dict:
    """Run one program against its tests: how both processes ended. The judge tells the trainer itself."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours, theirs = near.detach(), far.detach()
    limits = request["limits"]
    program = os.fork()
    if not program:
        start(theirs, limits, lambda pipe: candidate.main(pipe, request["source"]))
    tester = os.fork()
    if not tester:
        request["source"] = ""
        keep = [ours, tests, result]
        own = limits | {"memory": limits["judge_memory"], "cpu": limits["wall"]}
        start(ours, own, lambda _: judge.main(*keep), keep)
    for descriptor in (ours, theirs, tests, result):
        os.close(descriptor)
    ended = watch(program, tester, limits)
    for child in (program, tester):
        os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is still its own
    return {"ended": ended, "candidate": reap(program), "tester": reap(tester)}


def start(descriptor: int, limits: dict, body, keep: list[int] | None = None) -> None:
    """In a child: close everything else, set limits, give up the right to start processes, and go."""
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(1, 2)  # both are /dev/null, opened for writing before there was a filter
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        close_others([0, 1, 2, *(keep or [descriptor])])
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        set_limits(limits)
        filters.install(filters.child_filter(os.getpid()))
        body(descriptor)
    except BaseException:
        os._exit(97)
    os._exit(0)


def close_others(keep: list[int]) -> None:
    kept = sorted(set(keep))
    for low, high in zip([-1, *kept], [*kept, 1 << 16], strict=True):
        if low + 1 < high:  # an empty range would be taken for an endless one
            os.closerange(low + 1, high)


def set_limits(limits: dict) -> None:
    seconds = max(1, int(limits["cpu"] + 0.999))
    for name, value in (
        (resource.RLIMIT_CPU, seconds + 1), (resource.RLIMIT_AS, limits["memory"]), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_STACK, 8 << 20),
    ):  # fmt: skip
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def watch(program: int, tester: int, limits: dict) -> str:
    """Until the judge has gone, or time is up: "done", "cpu" or "wall"."""
    clock = (~program << 3) | 2  # the CPU clock of another process, see clock_getcpuclockid
    end = time.monotonic() + limits["wall"]
    while True:
        if os.waitid(os.P_PID, tester, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return "done"
        signal.sigtimedwait([signal.SIGCHLD], POLL_SECONDS)
        try:
            if time.clock_gettime(clock) >= limits["cpu"]:
                return "cpu"
        except OSError:
            pass
        if time.monotonic() >= end:
            return "wall"


def reap(child: int) -> dict:
    _, status, usage = os.wait4(child, 0)
    return {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
