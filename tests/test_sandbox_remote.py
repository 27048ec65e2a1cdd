"""The sandbox behind HTTP, with a server in a process of its own: verdicts as here, refusals, ends, new beginnings."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.sandbox_servers import TOKEN, Process, ask, wait_until
from tests.test_sandbox import EXHAUSTION, FORGERIES, HONEST, squares
from unmask.build import make_task
from unmask.cli import main
from unmask.config import to_table
from unmask.errors import RewardError
from unmask.sandbox import pool as pool_module
from unmask.sandbox.pool import SandboxUnavailable
from unmask.sandbox.protocol import (
    MAX_REQUEST,
    message,
    program_message,
    read_program,
    verdict_message,
)  # fmt: skip
from unmask.sandbox.remote import RemoteSandbox
from unmask.sandbox.verdicts import BrokenTests, Limits, LostWorker, Program, Verdict
from unmask.types import Example

SHORT = Limits(cpu=0.3, wall=4.0)


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    found = Process(tmp_path_factory.mktemp("served"))
    yield found
    if found.process.poll() is None:
        found.end(signal.SIGTERM)


@pytest.fixture
def served(process):
    """The server, started again if a test has ended it."""
    if process.process.poll() is not None:
        process.start(process.port)
    return process


# ---- the same verdicts


PROGRAMS = {
    **{f"honest: {name}": squares(HONEST[name]) for name in ("plain", "numpy", "byte-order mark", "prints", "thread")},
    **{f"forged: {name}": squares(source) for name, source in FORGERIES.items()},
    **{f"forged, executed: {name}": squares(FORGERIES[name], setup="pass") for name in ("quiet exit", "pickle")},
    **{
        f"too much: {name}": squares(EXHAUSTION[name], limits=SHORT)
        for name in ("heap", "descriptors", "deep answer", "surrogates", "nul", "bad exception", "compiling")
    },
    "reads its input": Program("print(sum(map(int, input().split())))", ["3", "7"], [], stdin=["1 2", "3 5"]),
    "edits its argument": Program(
        "def f(v):\n    v.append(9)", ["v = [1]\nf(v)\nassert v == [1, 9]"], ["f"], copies_back=True
    ),
    "half": squares("def f(x): return 4"),
    "no Python": squares("def f("),
    "endless": squares("while True: pass", limits=SHORT),
    "forbidden": squares("import os\ndef f(x): os.fork()"),
    "crash": squares("import ctypes\ndef f(x): ctypes.string_at(0)"),
    "half of a pair": squares("x = '\ud800'\ndef f(x): return x * x"),
    "NUL in the source": squares("def f(x): return 4\0"),
    "a message": squares("def f(x): raise ValueError('a line\\nand \"another\" \u202e')", setup="k = 1"),
    "memory": squares("def f(x): return bytearray(10 ** 10)"),
    "no tests": Program("x = 1", [], ["f"]),
    "helpers": Program("def f(x): return x", ["assert g(f(2)) == 4"], ["f"], helpers="def g(x): return 2 * x"),
}


STATUS = {
    "honest: plain": "correct", "half": "wrong", "endless": "timeout", "memory": "out_of_memory",
    "forbidden": "forbidden", "crash": "error",
}  # fmt: skip


def told(verdict: Verdict) -> bytes:
    """All but what differs from one run to the next here too."""
    return verdict_message(replace(verdict, cpu_seconds=0.0, peak_bytes=0))


@pytest.mark.parametrize("part", range(4))
def test_verdicts_are_byte_for_byte_those_of_this_machine(sandbox, served, part):
    names = list(PROGRAMS)[part::4]
    programs = [PROGRAMS[name] for name in names]
    here, there = sandbox.run(programs), served.client(num_workers=2).run(programs)
    for name, one, other in zip(names, here, there, strict=True):
        assert told(one) == told(other), name
        assert 0 <= other.cpu_seconds < 20 and 0 <= other.peak_bytes < 1 << 40
        assert other.status == STATUS.get(name, other.status)


def test_tests_that_cannot_be_used_are_the_same_error(sandbox, served):
    program, texts = squares("def f(x): return x", helpers="import no_such_module"), []
    for runner in (sandbox, served.client()):
        with pytest.raises(BrokenTests, match=r"helpers fail .ModuleNotFoundError") as raised:
            runner.run([program])
        texts.append(str(raised.value))
    assert texts[0] == texts[1]


def test_a_code_task_is_judged_where_its_recipe_says(served):
    settings = {"url": served.url, "token_file": str(served.token_file)}
    settings["patience"] = 5.0
    task = make_task(
        {"type": "code", "data": "none", "prompt": "complete", "cpu_seconds": 0.3, "sandbox": settings}
    ).value
    columns = {"question": "def f(x):\n", "tests": ["assert f(2) == 4"], "names": ["f"], "setup": "", "helpers": ""}
    examples = [Example(n, "", columns) for n in range(3)]
    scores = task.score_all(examples, ["    return x * x\n", "    return x\n", "    while 1: pass\n"])
    assert [s.status for s in scores] == ["correct", "wrong", "timeout"] and task.runner.level.startswith("remote, ")
    table = to_table(task, "code")
    assert table["sandbox"] == settings and make_task(table).value == task
    assert TOKEN not in json.dumps(table)
    task.runner.close()


def test_the_level_and_the_self_test_are_told(served, sandbox, capsys):
    code, said = ask(served.port, "GET", "/health", None)
    assert code == 200 and said["level"] == sandbox.level and said["self_test"] == "passed" and said["attacks"] >= 18
    assert served.client().level == f"remote, {sandbox.level}"
    assert main(["sandbox", "check", served.url, "--token-file", str(served.token_file)]) == 0
    assert re.search(r"honest +correct\nforged +wrong\n$", capsys.readouterr().out)
    with pytest.raises(SandboxUnavailable, match=r"lacks torch.*--packages numpy,torch"):
        RemoteSandbox(served.url, TOKEN, packages=("numpy", "torch"))


# ---- what the server refuses


def good() -> dict:
    return json.loads(program_message(PROGRAMS["half"]))


def changed(**fields) -> bytes:
    found = good()
    found["program"] |= fields
    return json.dumps(found).encode()


LIMITS = asdict(Limits())
REQUESTS = {
    "wrong token": ({"token": TOKEN[:-1]}, 401, "unauthorized"),
    "no token": ({"Authorization": None}, 401, "unauthorized"),
    "another scheme": ({"Authorization": f"Basic {TOKEN}"}, 401, "unauthorized"),
    "token that is no ASCII": ({"token": "é" * 20}, 401, "unauthorized"),
    "health without a token": ({"method": "GET", "path": "/health", "token": "x"}, 401, "unauthorized"),
    "another path": ({"path": "/judge/../x"}, 404, "unknown"),
    "a path to get": ({"method": "GET", "path": "/judge"}, 404, "unknown"),
    "another method": ({"method": "PUT"}, 400, "malformed"),
    "no length": ({"Content_Length": None}, 400, "malformed"),
    "a length that is none": ({"Content_Length": "-1"}, 400, "malformed"),
    "chunks": ({"Transfer_Encoding": "chunked"}, 400, "malformed"),
    "oversized": ({"Content_Length": str(MAX_REQUEST + 1)}, 413, "too_large"),
    "not JSON": ({"body": b"{'a': 1}"}, 400, "malformed"),
    "empty": ({"body": b""}, 400, "malformed"),
    "not UTF-8": ({"body": b'"\xff"'}, 400, "malformed"),
    "deep": ({"body": b"[" * 100_000}, 400, "malformed"),
    "a long number": ({"body": b"1" * 10_000}, 400, "malformed"),
    "a list": ({"body": b"[]"}, 400, "malformed"),
    "no version": ({"body": b"{}"}, 400, "malformed"),
    "another version": ({"body": json.dumps({**good(), "protocol": 2}).encode()}, 400, "version"),
    "a version that is true": ({"body": json.dumps({**good(), "protocol": True}).encode()}, 400, "version"),
    "one field more": ({"body": json.dumps({**good(), "more": 1}).encode()}, 400, "malformed"),
    "no program": ({"body": message()}, 400, "malformed"),
    "a source that is none": ({"body": changed(source=None)}, 400, "malformed"),
    "tests that are a text": ({"body": changed(tests="assert f(2) == 4")}, 400, "malformed"),
    "a test that is none": ({"body": changed(tests=["x", 1])}, 400, "malformed"),
    "an unknown limit": ({"body": changed(limits=LIMITS | {"files": 1})}, 400, "malformed"),
    "a limit that is true": ({"body": changed(limits=LIMITS | {"cpu": True})}, 400, "malformed"),
    "a limit without end": ({"body": changed(limits=LIMITS | {"wall": float("inf")})}, 400, "malformed"),
    "no memory": ({"body": changed(limits=LIMITS | {"memory": 0})}, 400, "malformed"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_server_refuses_in_one_line(served, name):
    request, status, kind = REQUESTS[name]
    code, said = ask(served.port, **request)
    assert (code, said["refused"]) == (status, kind)
    assert said.keys() == {"protocol", "refused", "text"} and said["text"].count("\n") == 0 and len(said["text"]) < 200


def test_the_token_is_nowhere_to_be_read_and_the_server_still_works(served):
    command = Path(f"/proc/{served.process.pid}/cmdline").read_bytes().decode()
    assert TOKEN not in command + served.said + served.log.read_text() + repr(served.client())
    assert served.log.read_text().count("refused, unauthorized") >= 1
    assert served.client().run([PROGRAMS["honest: plain"]])[0].status == "correct"
    with pytest.raises(SandboxUnavailable, match=r"refuses the token: give both sides the same") as raised:
        RemoteSandbox(served.url, "another-token-0123456789")
    assert "another-token" not in str(raised.value)


def test_what_no_server_would_take_is_not_sent(served):
    client = served.client()
    with pytest.raises(LostWorker, match=r"with its tests it takes .* bytes, at most"):
        client.run([replace(PROGRAMS["half"], helpers=" " * MAX_REQUEST)])
    with pytest.raises(LostWorker, match=r"program.limits.cpu is not of the type or the range"):
        client.run([squares("", limits=Limits(cpu=float("nan")))])


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_arrive_as_they_were_sent(name):
    program = PROGRAMS[name]
    assert read_program(program_message(program)) == replace(program, tests=[*program.tests], names=[*program.names])


def test_nobody_there_is_one_line_that_says_what_to_do(capsys, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    arguments = ["--token-file", str(tmp_path / "token")]
    assert main(["sandbox", "check", f"http://127.0.0.1:{port}", *arguments]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and f"http://127.0.0.1:{port}" in said and "start it with `unmask sandbox serve`" in said
    )
    for wrong, message_of in (
        (["check"], "check wants the URL"),
        (["serve", "http://x"], "takes no URL"),
        (["serve", "--port", "70000"], "--port 70000"),
        (["serve", "--queue", "-1"], "--queue -1"),
        (["serve", "--num-workers", "0", *arguments], "at least 1 is needed"),
        (["serve", "--token-file", str(tmp_path / "none")], "cannot be read"),
    ):
        assert main(["sandbox", *wrong]) == 2
        assert message_of in capsys.readouterr().err


def test_a_machine_that_cannot_confine_does_not_serve(monkeypatch, capsys, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(pool_module, "weaknesses", lambda run, **_: ["start a process"])
    assert main(["sandbox", "serve", "--port", "0", "--packages", "", "--token-file", str(tmp_path / "token")]) == 2
    assert "SandboxUnavailable" in capsys.readouterr().err


def test_a_port_that_is_taken(served, capsys):
    arguments = ["--port", str(served.port), "--packages", "", "--num-workers", "1"]
    assert main(["sandbox", "serve", *arguments, "--token-file", str(served.token_file)]) == 2
    assert f"--port {served.port}: not to be had (Address already in use)" in capsys.readouterr().err


# ---- the end of a server


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


ASLEEP = squares("import time\ntime.sleep(1.5)\ndef f(x): return 0", limits=Limits(cpu=1.0, wall=20.0))


def is_running(server) -> bool:
    return ask(server.port, "GET", "/health", None)[1]["running"] == 1


def test_a_killed_server_stops_the_run(served):
    client = served.client(num_workers=2, patience=0.6)
    supervisors, raised = children_of(served.process.pid), []
    assert supervisors

    def batch():
        try:
            client.run([PROGRAMS["honest: plain"], ASLEEP, *[PROGRAMS["honest: plain"]] * 200])
        except RewardError as error:
            raised.append(str(error))

    thread = threading.Thread(target=batch)
    thread.start()
    wait_until(lambda: is_running(served))
    time.sleep(0.3)
    served.end(signal.SIGKILL)
    began = time.monotonic()
    thread.join(20)
    (text,) = raised
    assert time.monotonic() - began < 5 and "\n" not in text
    assert re.fullmatch(
        rf"the sandbox at {re.escape(served.url)} cannot be reached \(.*, tried for 0.6 s\): start it with `unmask "
        r"sandbox serve`, and look at the tunnel to it. No reward was made up; mend it and go on with --resume.",
        text,
    )
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in supervisors))


def test_a_run_goes_on_with_a_server_that_is_started_again(process):
    client, found = process.client(num_workers=2), []
    if process.process.poll() is None:
        process.end(signal.SIGKILL)
    thread = threading.Thread(target=lambda: found.extend(client.run([PROGRAMS["honest: plain"]] * 3)))
    thread.start()  # nobody is there
    process.start(process.port)
    thread.join(60)
    assert [verdict.status for verdict in found] == ["correct"] * 3


def test_a_server_that_is_told_to_stop_answers_what_runs(served):
    client, found = served.client(patience=0.0), []
    thread = threading.Thread(target=lambda: found.extend(client.run([ASLEEP])))
    thread.start()
    wait_until(lambda: is_running(served))
    assert served.end(signal.SIGTERM) == 0 and served.said.endswith("stopped\n")
    thread.join(20)
    assert found[0].passed == (False, False)
    with pytest.raises(LostWorker, match="cannot be reached"):
        client.run([PROGRAMS["honest: plain"]])
