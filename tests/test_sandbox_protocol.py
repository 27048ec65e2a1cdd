"""The two ends of a sandbox behind HTTP, each by itself: turns, bounds, answers that are none, settings."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from tests.sandbox_servers import HEALTHY, TOKEN, Liar, ask, http_answer, lying, verdict_of, wait_until
from tests.test_sandbox import squares
from unmask.build import make_task
from unmask.errors import ConfigError
from unmask.sandbox import remote as remote_module
from unmask.sandbox import server as server_module
from unmask.sandbox.pool import SandboxUnavailable
from unmask.sandbox.protocol import message, program_message, read_token
from unmask.sandbox.remote import RemoteSandbox, read_url
from unmask.sandbox.server import Busy, Gate, Server
from unmask.sandbox.verdicts import LostWorker, Verdict
from unmask.types import Status

# ---- turns


def test_so_many_run_and_so_many_wait(monkeypatch):
    gate, inside, leave, refused = Gate(2, 1), threading.Semaphore(0), threading.Event(), []

    def enter():
        try:
            with gate.turn():
                inside.release()
                leave.wait(20)
        except Busy as error:
            refused.append(str(error))

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert inside.acquire(timeout=20) and inside.acquire(timeout=20)
    wait_until(lambda: gate.waiting == 1)
    with pytest.raises(Busy, match="busy"), gate.turn():
        pass
    assert (gate.running, gate.waiting) == (2, 1)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert refused == [] and (gate.running, gate.waiting) == (0, 0)
    monkeypatch.setattr(server_module, "QUEUE_SECONDS", 0.05)
    narrow = Gate(1, 5)
    with narrow.turn(), pytest.raises(Busy, match="busy"), narrow.turn():  # waits for its time, and not for longer
        pass
    narrow.close()
    with pytest.raises(Busy, match="stopping"), narrow.turn():
        pass


class Slow:
    """In the place of a pool: every program is wrong, once it is let go."""

    num_workers, packages, level = 1, ("numpy",), "none"

    def __init__(self):
        self.go, self.begun = threading.Event(), threading.Semaphore(0)

    def run_one(self, program):
        self.begun.release()
        assert self.go.wait(20)
        return Verdict(Status.WRONG, (False,), len(program.tests))


@contextmanager
def listening(pool, queue=0):
    server = Server(pool, TOKEN, "127.0.0.1", 0, queue)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        pool.go.set()
        server.shutdown()
        server.server_close()
        thread.join()
        wait_until(lambda: server.open == 0)


def test_a_full_server_says_so_and_a_client_comes_again(capfd):
    pool = Slow()
    with listening(pool) as server:
        client = RemoteSandbox(server.url, TOKEN, num_workers=2, patience=20.0)
        impatient = replace(client, patience=0.1)
        found = []
        thread = threading.Thread(target=lambda: found.extend(client.run([squares("")] * 3)))
        thread.start()
        assert pool.begun.acquire(timeout=20)
        assert ask(server.server_address[1], body=program_message(squares("")))[1]["refused"] == "busy"
        with pytest.raises(LostWorker, match=r"has been busy all the time: start it with more --num-workers"):
            impatient.run([squares("")])
        pool.go.set()
        thread.join(20)
        assert [verdict.status for verdict in found] == ["wrong"] * 3
    assert "refused, busy" in capfd.readouterr().err


def test_connections_are_bounded_and_slow_ones_ended(monkeypatch):
    monkeypatch.setattr(server_module, "SPARE_CONNECTIONS", 2)
    monkeypatch.setattr(server_module, "READ_SECONDS", 1.0)
    with listening(Slow(), queue=1) as server:
        address = server.server_address
        idle = [socket.create_connection(address) for _ in range(4)]  # 1 worker, 1 in the queue, 2 to spare
        wait_until(lambda: server.open == 4)
        with socket.create_connection(address) as one_more:
            one_more.settimeout(10)
            assert b"503" in one_more.recv(1000)
        for drop in range(8):  # each byte in time, the request never
            for connection in idle:
                with suppress(OSError):
                    connection.send(b"POST /judge HTTP/1.1\r\n"[drop : drop + 1])
            time.sleep(0.2)
        wait_until(lambda: server.open == 0)
        for connection in idle:
            connection.close()


def test_a_fault_of_the_server_is_no_verdict(capfd):
    pool = Slow()
    for raised, kind in ((LostWorker("x"), "lost"), (KeyError("secret"), "failed")):
        pool.run_one = lambda program, raised=raised: (_ for _ in ()).throw(raised)
        with listening(pool) as server:
            status, said = ask(server.server_address[1], body=program_message(squares("")))
            assert (status, said["refused"]) == (500, kind) and "secret" not in json.dumps(said)
            with pytest.raises(LostWorker, match=r"lost a worker twice|failed at a program"):
                RemoteSandbox(server.url, TOKEN).run([squares("")])
    assert "Traceback" not in capfd.readouterr().err


# ---- a server that lies


LIES = {
    "correct without all tests": (200, verdict_of(passed=[True])),
    "correct with one failed": (200, verdict_of(passed=[True, False])),
    "more tests than there are": (200, verdict_of(passed=[True] * 3, num_tests=3)),
    "more passed than tests": (200, verdict_of(passed=[True] * 3)),
    "numbers for truths": (200, verdict_of(passed=[1, 1])),
    "an unknown status": (200, verdict_of(status="splendid")),
    "a status that is another's": (200, verdict_of(status="unparsed")),
    "a status that is a list": (200, verdict_of(status=["correct"])),
    "a reason that is none": (200, verdict_of(reason=None)),
    "a long reason": (200, verdict_of(reason="evil" * 100_000)),
    "time below zero": (200, verdict_of(cpu_seconds=-1.0)),
    "wrong with every test passed": (200, verdict_of(status="wrong")),
    "time beyond all floats": (200, verdict_of().replace(b"0.1", b"1" + b"0" * 400)),
    "time that is a text": (200, verdict_of(cpu_seconds="evil")),
    "memory without end": (200, verdict_of(peak_bytes=1 << 60)),
    "one field more": (200, verdict_of(evil=1)),
    "a number that is none": (200, verdict_of().replace(b"0.1", b"NaN")),
    "no verdict": (200, message(evil=1)),
    "another version": (200, verdict_of().replace(b'"protocol": 1', b'"protocol": 3')),
    "HTML": (200, b"<html>evil</html>"),
    "nothing": (200, b""),
    "endless": (200, b"evil" * 1_000_000),
    "another status": (302, b"evil"),
    "a refusal with another status": (200, message(refused="busy", text="evil")),
    "a refusal that does not fit": (404, message(refused="busy", text="evil")),
    "an unknown refusal": (400, message(refused="evil", text="evil")),
    "broken with more": (200, message(broken="evil", verdict=1)),
}


@pytest.mark.parametrize("name", LIES)
def test_what_has_not_the_form_of_a_verdict_is_none(name):
    liar, client = lying(http_answer(*LIES[name]), patience=0.0)
    with pytest.raises(LostWorker, match=re.escape(liar.url)) as raised:
        client.run([squares("def f(x): return 4")])
    text = str(raised.value)
    assert "\n" not in text and len(text) < 400 and "evil" not in text and "No reward was made up" in text
    assert liar.asked == 2  # nothing is asked again that would be answered the same
    liar.listener.close()


def test_a_true_verdict_among_them_is_taken():
    liar, client = lying(http_answer(200, verdict_of()))
    assert client.run([squares("")]) == [Verdict(Status.CORRECT, (True, True), 2, "", 0.1, 9)]
    liar.listener.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("self_test", "failed"), ("level", "evil\n\x1b[31m"), ("workers", 0), ("packages", "numpy"), ("attacks", None)],
)
def test_a_server_that_does_not_confine_is_not_used(field, value):
    liar = Liar(http_answer(200, message(**(HEALTHY | {field: value}))))
    with pytest.raises(SandboxUnavailable, match=rf"says what is no answer: the answer.{field}") as raised:
        RemoteSandbox(liar.url, TOKEN)
    assert "evil" not in str(raised.value)
    liar.listener.close()


def test_no_http_is_no_answer_and_an_answer_that_drips_is_cut_off(monkeypatch):
    liar, client = lying(b"evil evil evil\r\n\r\n", patience=0.0)
    with pytest.raises(LostWorker, match="no HTTP"):
        client.run([squares("")])
    monkeypatch.setattr(remote_module, "QUEUE_SECONDS", 0.0)
    monkeypatch.setattr(remote_module, "longest", lambda limits: 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        object.__setattr__(client, "_address", replace(client._address, port=listener.getsockname()[1]))
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        began = time.monotonic()
        with pytest.raises(LostWorker, match="cannot be reached"):
            client.run([squares("")])
        assert time.monotonic() - began < 4
    liar.listener.close()


def drip(listener):
    connection, _ = listener.accept()
    with connection:
        try:
            for byte in b"HTTP/1.1 200 OK\r\n" * 3:
                connection.send(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass


def test_busy_and_lost_connections_are_tried_again_with_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote_module.time, "sleep", pauses.append)
    busy = http_answer(503, message(refused="busy", text="x"))
    liar, client = lying(
        busy, b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", busy, http_answer(200, verdict_of())
    )
    assert client.run([squares("")])[0].status == "correct"
    assert liar.asked == 6 and pauses == [0.25, 0.5, 1.0, 2.0]
    liar.listener.close()


# ---- settings


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix"),
    [
        ("http://127.0.0.1:8723", "127.0.0.1", 8723, ""),
        ("https://box.example/judge/", "box.example", 443, "/judge"),
        ("http://[::1]:80/", "::1", 80, ""),
    ],
)
def test_urls(url, host, port, prefix):
    found = read_url(url)
    assert (found.host, found.port, found.prefix, found.is_tls) == (host, port, prefix, url.startswith("https"))


@pytest.mark.parametrize(
    "url",
    ["", "box:8723", "ftp://box", "http://", "http://me:secret@box", "http://box:x", "http://box:99999", "http://b/?q=1",
     "http://b/\r\nX: y", "http://b/ c", "http://böx", "file:///etc/passwd"],
)  # fmt: skip
def test_urls_that_are_none(url):
    with pytest.raises(ConfigError, match=r"task.sandbox.url: must be http://HOST:PORT") as raised:
        make_task({"type": "code", "sandbox": {"url": url}})
    assert "secret" not in str(raised.value)


def test_settings_that_do_not_go_together(monkeypatch, tmp_path):
    for sandbox, said in (
        ({"token_file": "x"}, "task.sandbox.token_file: is for a server"),
        ({"url": "http://b", "patience": -1}, "task.sandbox.patience = -1"),
        ({"urls": "http://b"}, "unknown key task.sandbox.urls"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            make_task({"type": "code", "sandbox": sandbox})
    monkeypatch.delenv("UNMASK_SANDBOX_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"no token: name a file that holds it with task.sandbox.token_file, or set"):
        _ = make_task({"type": "code", "sandbox": {"url": "http://127.0.0.1:1"}}).value.runner
    monkeypatch.setenv("UNMASK_SANDBOX_TOKEN", TOKEN)
    assert read_token(None, "--token-file") == TOKEN
    for content in (b"short", b"has a space in it 0123", b"\xff" * 40, b"x" * 600):
        (tmp_path / "token").write_bytes(content)
        with pytest.raises(ConfigError, match="holds no token, which is 16 to 512") as raised:
            read_token(str(tmp_path / "token"), "--token-file")
        assert content.decode("latin-1") not in str(raised.value)
