"""Landlock: which files this process and all that come from it may open, without any privilege."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every machine
_VERSION, _PATH_BENEATH = 1, 1

_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""ABI from which on: how many rights on files it knows (the lowest so many bits)."""
_TCP_FROM, _TCP = 4, 0b11
_SCOPES_FROM, _SCOPES = 6, 0b11


class _Rules(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock, system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def abi() -> int:
    """Version of the kernel's Landlock. Raises: OSError if it has none."""
    return _call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))


def restrict(readable: Sequence[str]) -> int:
    """From now on only files beneath these paths can be opened, for reading and executing; no TCP port, and where the
    kernel can, no signal and no abstract socket of processes outside. Returns the ABI. Raises: OSError."""
    version = abi()
    num_rights = max(count for first, count in _FILE_RIGHTS.items() if first <= version)
    rules = _Rules((1 << num_rights) - 1, _TCP * (version >= _TCP_FROM), _SCOPES * (version >= _SCOPES_FROM))
    size = 24 if version >= _SCOPES_FROM else 16 if version >= _TCP_FROM else 8
    ruleset = _call(_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for path in readable:
            if not os.path.exists(path):
                continue
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = _EXECUTE | _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
            try:
                rule = _Beneath(rights, parent)
                _call(_ADD, ctypes.c_int(ruleset), _PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0))
            finally:
                os.close(parent)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
        _call(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return version
