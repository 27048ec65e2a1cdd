"""The level of bubblewrap: its command line, the measurement that decides, programs that only have its name, and where
it is installed the thing itself."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_sandbox import EXHAUSTION, FORGERIES, HONEST, squares
from unmask.isolation import landlock
from unmask.sandbox import namespaces, self_test
from unmask.sandbox import pool as pool_module
from unmask.sandbox.pool import LocalSandbox, SandboxUnavailable
from unmask.sandbox.probe import probe
from unmask.sandbox.verdicts import Limits, Program

PLAIN = squares("def f(x): return x * x")


def test_the_command_line(tmp_path):
    for name in ("b", "b/inner", "a"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    readable = [str(tmp_path / name) for name in ("b/inner", "a", "missing", "b")] + ["/dev/null", "/dev/urandom"]
    words = namespaces.wrapped("/usr/bin/bwrap", ["python", "-s", "x y"], {"A": "1", "B": "--dev"}, readable)
    a, b, inner = (str(tmp_path / name) for name in ("a", "b", "b/inner"))
    assert words == [
        "/usr/bin/bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL",
        "--ro-bind", a, a, "--ro-bind", b, b, "--ro-bind", inner, inner,
        "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/",
        "--setenv", "A", "1", "--setenv", "B", "--dev", "--", "python", "-s", "x y",
    ]  # fmt: skip
    assert "--proc" not in words and "--bind" not in words and "--share-net" not in words


# ---- what is measured


def test_this_process_shares_all_namespaces_with_itself_and_with_whom_it_cannot_look_at():
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert namespaces.shared(os.getpid()) == namespaces.shared(ended.pid) == list(namespaces.NAMESPACES)


def test_a_process_in_a_namespace_of_its_own_is_found_to_be():
    code = "import ctypes, sys; print(ctypes.CDLL(None).unshare(0x50000000), flush=True); sys.stdin.read()"  # user, net
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as child:
        done = child.stdout.readline().strip()
        found = namespaces.shared(child.pid)
        child.stdin.close()
    if done != "0":
        pytest.skip("user namespaces are refused here")
    assert found == ["pid", "mnt", "ipc"]


def test_the_kernel_says_who_has_sent_a_message():
    ours, theirs = socket.socketpair()
    namespaces.ask_for_sender(ours)
    code = f"import os, socket; os.write({theirs.fileno()}, b'hello')"
    with ours, theirs:
        child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
        child.wait()
        assert namespaces.sender_of(ours) == child.pid
        assert ours.recv(9) == b"hello"  # nothing of it was taken
        theirs.send(b"more")
        assert ours.recv(9) == b"more"
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            namespaces.sender_of(ours)


# ---- programs that have the name alone

STUBS = {
    "fails": ("echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1", r"uid map: Permission denied"),
    "ends well": ("exit 0", r"bwrap confines nothing here \(nothing was said\)"),
    "runs it as it is": (
        'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
        r"bwrap leaves programs in namespaces of this process \(user, pid, net, mnt, ipc\)",
    ),
    "runs it in some namespaces": (
        'while [ "$1" != -- ]; do shift; done; shift; exec unshare --user --net "$@"',
        r"bwrap leaves programs in namespaces of this process \(pid, mnt, ipc\)|unshare failed",
    ),
}


@pytest.mark.parametrize("name", STUBS)
def test_the_name_of_bubblewrap_is_not_believed(name, tmp_path, monkeypatch):
    body, reason = STUBS[name]
    stub = tmp_path / "bwrap"
    stub.write_text(f"#!/bin/sh\nPATH={os.defpath}\n{body}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert namespaces.bubblewrap() == str(stub)
    try:
        sandbox = LocalSandbox(packages=())
    except SandboxUnavailable as error:
        assert "a program can" not in str(error)
        pytest.skip(f"Landlock, to which this falls back, is not to be had: {error}")
    try:
        assert sandbox.level.startswith("landlock(ABI")
        assert len(sandbox.passed_over) == 1 and re.search(reason, sandbox.passed_over[0])
        assert sandbox.run([PLAIN])[0].status == "correct"
        assert len(sandbox._all) == 1
    finally:
        sandbox.close()


def test_one_that_never_answers_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    stub = tmp_path / "bwrap"
    stub.write_text(f"#!/bin/sh\nPATH={os.defpath}\nsleep 1000\n")  # which keeps standard error open
    stub.chmod(0o755)
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(SandboxUnavailable, match=r"bwrap confines nothing here \(nothing was said\)"):
        pool_module.start_worker((), is_heavy=False, wrapper=str(stub))
    assert time.monotonic() - began < 20


def test_a_hole_at_one_level_leads_to_the_next_and_one_at_both_to_a_refusal(monkeypatch):
    started = []

    def start(packages, *, is_heavy, wrapper):
        started.append(wrapper)
        return true_start(packages, is_heavy=is_heavy, wrapper=None)

    true_start = pool_module.start_worker
    monkeypatch.setattr(pool_module, "start_worker", start)
    monkeypatch.setattr(pool_module, "bubblewrap", lambda: "/usr/bin/bwrap")
    try:
        sandbox = LocalSandbox(packages=())
    except SandboxUnavailable as error:
        assert "fail with" not in str(error)
        pytest.skip(str(error))
    (reason,) = sandbox.passed_over  # what namespaces would have hidden was seen
    assert started == ["/usr/bin/bwrap", None] and "a program can see the name of a user's file." in reason
    sandbox.close()
    monkeypatch.setattr(pool_module, "weaknesses", lambda run, **_: ["start a process"])
    with pytest.raises(SandboxUnavailable, match=r"start a process.*start a process"):
        LocalSandbox(packages=())


# ---- the thing itself


@pytest.fixture(scope="module")
def confined():
    """At the level of namespaces. What the machine lacks is a reason to skip, a hole is not."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap wanted: no program bwrap on the PATH")
    try:
        found = LocalSandbox()
    except SandboxUnavailable as error:
        assert "a program can" not in str(error)
        pytest.skip(str(error))
    if not found.level.startswith("namespaces"):
        found.close()
        assert not any("a program can" in reason for reason in found.passed_over)
        pytest.skip(f"bubblewrap is refused here: {found.passed_over[0]}")
    yield found
    found.close()


def test_within_namespaces_the_other_layers_hold_too(confined):
    assert landlock().works == ("+landlock(ABI" in confined.level)
    assert confined.level.endswith("+seccomp") and confined.passed_over == []
    with self_test.bait() as found:
        tried = self_test.attacks(found, in_namespaces=True)
        verdicts = dict(zip(tried, confined.run(list(tried.values())), strict=True))
    assert len(tried) == self_test.num_attacks(in_namespaces=True)
    assert [name for name, verdict in verdicts.items() if verdict.status == "correct"] == []
    for name in ("start a process", "run another program", "trace its parent"):
        assert verdicts[name].status == "forbidden"  # by the filter


@pytest.mark.parametrize("setup", ["", "pass"])
def test_programs_fare_as_at_the_other_level(confined, setup):
    names = ("plain", "numpy", "thread", "asyncio", "lazy import", "tries to write")
    programs = [squares(HONEST[name], setup=setup, limits=Limits(cpu=5, wall=30)) for name in names]
    assert [verdict.status for verdict in confined.run(programs)] == ["correct"] * len(programs)
    forged = [squares(source, setup=setup) for source in FORGERIES.values()]
    assert not any(verdict.share for verdict in confined.run(forged))
    others = {
        "while True: pass": "timeout", "def f(x): return bytearray(10 ** 10)": "out_of_memory",
        "import os\ndef f(x): os.fork()": "forbidden", "import ctypes\ndef f(x): ctypes.string_at(0)": "error",
        EXHAUSTION["descriptors"]: "wrong",
    }  # fmt: skip
    found = confined.run([squares(source, setup=setup, limits=Limits(cpu=0.5, wall=20)) for source in others])
    assert [verdict.status for verdict in found] == list(others.values())


def test_nothing_of_this_machine_is_seen_and_nothing_outlives_the_worker(confined):
    seen = (
        "import os\ndef f(x):\n    there = [os.path.exists(p) for p in ({!r}, '/proc/1', '/home', '/etc/passwd')]\n"
        "    return [os.getppid() < 10, sorted(os.environ), *there]\n"
    )
    names = sorted(["PYTHONHASHSEED", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "LC_ALL"])
    test = f"assert f(1) == [True, {names!r}, False, False, False, False]"
    assert confined.run([Program(seen.format(str(Path(__file__))), [test], ["f"])])[0].status == "correct"
    before = LocalSandbox(packages=())
    worker = before._all[0]
    inner = descendants(worker.process.pid)
    assert len(inner) >= 3  # bubblewrap's own, the supervisor, the judge that stays
    before.close()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in inner):
        assert time.monotonic() < end
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [inner for child in children for inner in descendants(child)]


def test_the_probe_of_the_doctor_tells_the_level(confined):
    assert probe() == {"level": confined.level, "passed_over": []}
