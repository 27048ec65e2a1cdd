"""Seccomp filters: which system calls a process and all that it starts may make from now on.

The base filter is an allow-list whose default is to kill; it is installed once, in the supervisor, which may still fork
and send signals. The child filter takes that away from a candidate and a judge. Filters add up: the strictest counts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from system_calls import machine, number

KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _AND, _EQUAL, _GREATER, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_X32 = 0x40000000

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand

SAFE = [
    "read", "write", "close", "fstat", "stat", "lstat", "poll", "lseek", "mmap", "mprotect", "munmap", "brk",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "pread64", "pwrite64", "readv", "writev", "preadv", "pwritev",
    "access", "pipe", "pipe2", "select", "sched_yield", "mremap", "madvise", "dup", "dup2", "dup3", "pause",
    "nanosleep", "getitimer", "alarm", "setitimer", "getpid", "recvfrom", "sendmsg", "recvmsg", "shutdown",
    "getsockname", "getpeername", "getsockopt", "exit", "wait4", "waitid", "uname",
    "fsync", "fdatasync", "getdents", "getdents64", "getcwd", "readlink", "readlinkat", "umask", "gettimeofday",
    "getrlimit", "getrusage", "sysinfo", "times", "getuid", "getgid", "geteuid", "getegid", "getppid", "getpgrp",
    "getgroups", "getresuid", "getresgid", "getpgid", "getsid", "rt_sigpending", "rt_sigtimedwait", "rt_sigsuspend",
    "sigaltstack", "getpriority", "sched_getparam", "sched_getscheduler", "sched_get_priority_max",
    "sched_get_priority_min", "arch_prctl", "gettid", "time", "futex", "futex_waitv", "sched_getaffinity",
    "epoll_create", "epoll_create1", "epoll_wait", "epoll_pwait", "epoll_pwait2", "epoll_ctl", "set_tid_address",
    "restart_syscall", "clock_gettime", "clock_getres", "clock_nanosleep", "exit_group", "newfstatat", "faccessat",
    "faccessat2", "pselect6", "ppoll", "set_robust_list", "get_robust_list", "eventfd2", "getcpu", "getrandom",
    "membarrier", "statx", "rseq", "close_range",
]  # fmt: skip

REFUSED = [
    "flock", "setsockopt", "socket",
    "truncate", "ftruncate", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir", "creat", "link",
    "linkat", "unlink", "unlinkat", "symlink", "symlinkat", "chmod", "fchmod", "fchmodat", "fchmodat2", "chown",
    "fchown", "lchown", "fchownat", "utime", "utimes", "futimesat", "utimensat", "mknod", "mknodat", "setpgid",
    "setsid", "setpriority", "sched_setaffinity", "sync", "fallocate", "memfd_create", "copy_file_range", "chdir",
    "fchdir",
]  # fmt: skip
"""Not done, with EPERM: a program may try, and go on."""

MISSING = ["clone3", "openat2", "mbind", "set_mempolicy", "get_mempolicy"]
"""As if the kernel did not have them: libraries then take the older way."""

_THREAD = 0x00010000
_NAMESPACES = 0x7E020000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # O_TMPFILE would hold O_DIRECTORY
_HARMLESS_IOCTLS = (0x5401, 0x5413, 0x5421, 0x541B, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONBIO FIONREAD FIO(N)CLEX
_HARMLESS_FCNTLS = (0, 1, 2, 3, 1030)  # F_DUPFD F_GETFD F_SETFD F_GETFL F_DUPFD_CLOEXEC
_SET_FLAGS, _ASYNC = 4, 0x2000
ANY_PID = 0xFFFFFFF1
"""Stands in a filter for the number of the process that will install it; no process has it."""
_SET_NAME, _UNIX, _STREAM, _TYPE = 15, 1, 1, 0xF


def _return(value: int) -> Instruction:
    return _RETURN, 0, 0, value


def _load(argument: int, *, high: bool = False) -> Instruction:
    return _LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument + 4 * high


def _when(argument: int, mask: int, values: Sequence[int], otherwise: int) -> list[Instruction]:
    """Allowed if the low half of the argument, masked, is one of the values."""
    tests = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [_load(argument), (_AND, 0, 0, mask), *tests, _return(otherwise), _return(ALLOW)]


def _if_null(argument: int, otherwise: int) -> list[Instruction]:
    """Allowed if both halves of a pointer are zero."""
    return [
        _load(argument), (_EQUAL, 0, 2, 0), _load(argument, high=True), (_EQUAL, 1, 0, 0), _return(otherwise),
        _return(ALLOW),
    ]  # fmt: skip


def _descriptor_flags() -> list[Instruction]:
    """fcntl: copies and flags of descriptors. Not who is told about them: that would be a way to send signals."""
    tests = [(_EQUAL, 10 - place, 0, value) for place, value in enumerate(_HARMLESS_FCNTLS)]
    return [
        _load(1), *tests, (_EQUAL, 1, 0, _SET_FLAGS), _return(ERRNO | errno.EPERM), _load(2), (_AND, 0, 0, _ASYNC),
        (_EQUAL, 1, 0, 0), _return(ERRNO | errno.EPERM), _return(ALLOW),
    ]  # fmt: skip


def _rule(name: str, body: Sequence[Instruction]) -> list[Instruction]:
    call = number(name)
    return [] if call < 0 else [(_EQUAL, 0, len(body), call), *body]


def _head() -> list[Instruction]:
    """Kill what comes in by another machine's table, then load the number of the call."""
    column, arch = machine()
    head: list[Instruction] = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, arch), _return(KILL), (_LOAD, 0, 0, _NUMBER_AT)]
    if column == 0:
        head += [(_GREATER, 0, 1, _X32), _return(KILL)]
    return head


def base_filter() -> list[Instruction]:
    """What candidates, judges and their supervisor may do at all."""
    program = _head()
    for name in SAFE:
        program += _rule(name, [_return(ALLOW)])
    for name in REFUSED:
        program += _rule(name, [_return(ERRNO | errno.EPERM)])
    for name in MISSING:
        program += _rule(name, [_return(ERRNO | errno.ENOSYS)])
    program += _rule("open", _when(1, _WRITING, [0], ERRNO | errno.EROFS))
    program += _rule("openat", _when(2, _WRITING, [0], ERRNO | errno.EROFS))
    program += _rule("ioctl", _when(1, 0xFFFFFFFF, _HARMLESS_IOCTLS, ERRNO | errno.ENOTTY))
    program += _rule("fcntl", _descriptor_flags())
    program += _rule("sendto", _if_null(4, KILL))
    program += _rule("socketpair", [
        _load(0), (_EQUAL, 1, 0, _UNIX), _return(KILL), _load(1), (_AND, 0, 0, _TYPE), (_EQUAL, 1, 0, _STREAM),
        _return(KILL), _return(ALLOW),
    ])  # fmt: skip
    program += _rule("clone", _when(0, _NAMESPACES, [0], KILL))
    for name in ("kill", "tgkill", "prctl", "seccomp", "prlimit64", "setrlimit"):
        program += _rule(name, [_return(ALLOW)])  # the child filter says more
    return [*program, _return(KILL)]


def child_filter() -> list[Instruction]:
    """On top: no new process, no signal but to itself (`ANY_PID`), limits as they are, no other filter."""
    program = _head()
    program += _rule("clone", _when(0, _THREAD, [_THREAD], KILL))
    for name in ("kill", "tgkill"):
        program += _rule(name, _when(0, 0xFFFFFFFF, [ANY_PID], ERRNO | errno.EPERM))
    program += _rule("prlimit64", _if_null(2, ERRNO | errno.EPERM))
    program += _rule("setrlimit", [_return(ERRNO | errno.EPERM)])
    program += _rule("prctl", _when(0, 0xFFFFFFFF, [_SET_NAME], ERRNO | errno.EPERM))
    program += _rule("seccomp", [_return(KILL)])
    program += _rule("sendmsg", [_return(ERRNO | errno.EPERM)])  # a socket in flight outlives who sent it
    return [*program, _return(ALLOW)]


class _Header(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]


class Prepared:
    """A filter in the form that the kernel takes. A child that installs one made before the fork touches few pages."""

    def __init__(self, program: Sequence[Instruction]):
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
        self._code = ctypes.create_string_buffer(code, len(code))
        self._header = _Header(len(program), ctypes.cast(self._code, ctypes.c_void_p))
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._seccomp = ctypes.c_long(number("seccomp"))
        self._pids = [8 * place + 4 for place, (*_, operand) in enumerate(program) if operand == ANY_PID]

    def die_with_parent(self) -> None:
        """Have the kernel end this process with the one that forked it. Raises: OSError."""
        if self._libc.prctl(1, 9, 0, 0, 0):  # PR_SET_PDEATHSIG, SIGKILL
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")

    def install(self, pid: int = 0) -> None:
        """Apply it to this process, whose number is `pid`, and all that come from it. Raises: OSError if refused."""
        for place in self._pids:
            struct.pack_into("=I", self._code, place, pid)
        if self._libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
        if self._libc.syscall(self._seccomp, 1, 0, ctypes.byref(self._header)):  # SECCOMP_SET_MODE_FILTER
            raise OSError(ctypes.get_errno(), "seccomp(SECCOMP_SET_MODE_FILTER)")
