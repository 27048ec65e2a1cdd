"""One worker: confines itself, then forks a candidate and a judge for every program that it is sent.

    python -s -S -B -P supervisor.py SOCKET JUDGE SETTINGS

SETTINGS is JSON of "readable", "packages", "preload", "memory" and "in_namespaces".

The tests of a task come as a file descriptor that is only passed on, so that nothing this process has read can be found
by a later program. What is not trusted runs in children of this process alone. Tests that compare calls with literals
need no judge of their own: JUDGE is the socket by which they go to one that stays, which is forked before all programs.
"""

from __future__ import annotations

import array
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import candidate
import differential  # noqa: F401  for tests that use it, which need not read it again
import filters
import judge
import landlock
import lasting
import stdio
from channel import send

POLL_SECONDS = 0.02
JUDGE_SECONDS = 2.0
"""On the clock, for a judge to come to an end after its program has."""
LASTING = {"cpu": 3600.0, "wall": 3600.0}
"""Limits of that judge; a worker does not live so long."""


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    judging = int(sys.argv[2])
    settings = json.loads(sys.argv[3])
    sys.path.extend(settings["packages"])
    preload(settings["preload"])
    os.chdir("/")
    os.environ.pop("PWD", None)  # bubblewrap sets it
    files = confine_files(settings["readable"], is_needed=not settings["in_namespaces"])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # waited for, see watch()
    gc.collect()
    gc.freeze()
    filters.Prepared(filters.base_filter()).install()
    children = Children(settings["memory"], judging)
    send(link.fileno(), json.dumps({"ready": f"{files}seccomp"}).encode())
    while True:
        request, descriptors = receive_task(link)
        answer = children.serve(request, descriptors)
        send(link.fileno(), json.dumps(answer).encode())
        del request, answer


def confine_files(readable: list[str], *, is_needed: bool) -> str:
    """By Landlock, also within namespaces, where the kernel has it; what was done. Raises: OSError if it is needed."""
    try:
        return f"landlock(ABI {landlock.restrict(readable)})+"
    except OSError:
        if is_needed:
            raise
        return ""


def preload(names: list[str]) -> None:
    """Import what programs often want, so that children need not; what is missing is left out."""
    for name in names:
        try:
            __import__(name)
        except ImportError:
            continue


def receive_task(link: socket.socket) -> tuple[dict, array.array]:
    """The request, and unless its tests are literal the descriptor of the tests and that of a pipe to the trainer for
    what the judge says: neither is read here, where a later program might find it. Ends when the trainer has gone."""
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
    return json.loads(content), descriptors


class Children:
    """Candidates and judges. What each of them needs is made here, before the fork: a child pays for every page."""

    def __init__(self, memory: int, judging: int):
        self.filter = filters.Prepared(filters.child_filter())
        self.judge, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        keep = [judging, theirs.fileno()]
        self.fork(LASTING | {"memory": memory}, keep, lambda: lasting.main(*keep))
        os.close(judging)
        theirs.close()

    def serve(self, request: dict, descriptors: array.array) -> dict:
        """Run one program against its tests: how it ended. The judge tells the trainer itself."""
        if request["streams"]:
            return self.with_streams(request, descriptors)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours, theirs = near.detach(), far.detach()
        limits = request["limits"]
        program = self.fork(limits, [theirs], lambda: candidate.main(theirs, request["source"]))
        os.close(theirs)
        request["source"] = ""
        if not descriptors:
            return self.with_lasting_judge(program, ours, limits)
        keep = [ours, *descriptors]
        own = limits | {"memory": limits["judge_memory"], "cpu": limits["wall"]}
        tester = self.fork(own, keep, lambda: judge.main(*keep))
        for descriptor in keep:
            os.close(descriptor)

        ended = watch(program, lambda seconds: ends(tester, seconds), limits)
        os.kill(program, signal.SIGKILL)  # not reaped yet, so the number is still its own
        found = reap(program)
        ends(tester, JUDGE_SECONDS)  # it reads that the program has gone, and says what was passed until then
        os.kill(tester, signal.SIGKILL)
        return {"ended": ended, "candidate": found, "tester": reap(tester)}

    def with_streams(self, request: dict, descriptors: array.array) -> dict:
        """A program that reads standard input: pipes join it to its judge, and it may come to its own end."""
        limits = request["limits"]
        (given, feeds), (printed, prints) = os.pipe(), os.pipe()
        near, far = [given, prints], [feeds, printed, *descriptors]
        program = self.fork(limits, near, lambda: stdio.run(*near, request["source"]))
        request["source"] = ""
        own = limits | {"memory": limits["judge_memory"], "cpu": limits["wall"]}
        tester = self.fork(own, far, lambda: stdio.judge(*far))
        for descriptor in (*near, *far):
            os.close(descriptor)
        ended = watch(program, lambda seconds: ends(program, seconds), limits)
        os.kill(program, signal.SIGKILL)  # not reaped yet
        found = reap(program)
        ends(tester, JUDGE_SECONDS)  # it reads the end of the output
        os.kill(tester, signal.SIGKILL)
        return {"ended": ended, "candidate": found, "tester": reap(tester)}

    def with_lasting_judge(self, program: int, ours: int, limits: dict) -> dict:
        """The judge that stays gets the socket to the program, and says with a byte that it is done. Ends this process
        if it does not: the trainer then takes another worker, and a judge of the program's own."""
        socket.send_fds(self.judge, [b"."], [ours])
        os.close(ours)

        def judged(seconds: float) -> bool:
            return bool(select.select([self.judge], [], [], seconds)[0])

        ended = watch(program, judged, limits)
        os.kill(program, signal.SIGKILL)
        found = reap(program)  # the judge then reads the end of what it said
        if not judged(JUDGE_SECONDS) or not self.judge.recv(1):
            os._exit(1)
        return {"ended": ended, "candidate": found}

    def fork(self, limits: dict, keep: list[int], body: Callable[[], None]) -> int:
        """A child that closes everything else, has its limits, can start no process, and goes."""
        child = os.fork()
        if child:
            return child
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(1, 2)  # both are /dev/null, opened for writing before there was a filter
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            close_others([0, 1, 2, *keep])
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            set_limits(limits)
            self.filter.die_with_parent()
            self.filter.install(os.getpid())
            body()
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


def ends(child: int, seconds: float) -> bool:
    """Whether a child ends within that time; its number is not taken away."""
    end = time.monotonic() + seconds
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        left = end - time.monotonic()
        if left <= 0:
            return False
        signal.sigtimedwait([signal.SIGCHLD], left)  # of any child
    return True


def watch(program: int, judged: Callable[[float], bool], limits: dict) -> str:
    """Until the judge is done, for which `judged` waits so many seconds, or time is up: "done", "cpu" or "wall"."""
    clock = (~program << 3) | 2  # the CPU clock of another process, see clock_getcpuclockid
    end = time.monotonic() + limits["wall"]
    while True:
        if judged(POLL_SECONDS):
            return "done"
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
