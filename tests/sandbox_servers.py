"""Servers of programs for tests: a real one in a process of its own, and one that says what it is told to say."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from copy import copy
from pathlib import Path

import pytest

from unmask.sandbox.protocol import message
from unmask.sandbox.remote import RemoteSandbox

TOKEN = "a-token-of-the-tests-0123456789"


class Process:
    """`unmask sandbox serve` as a process of its own."""

    def __init__(self, folder: Path):
        self.log, self.token_file = folder / "log", folder / "token"
        self.token_file.write_text(TOKEN + "\n")
        self.start(0)
        self._client = RemoteSandbox(self.url, TOKEN)

    def start(self, port: int):
        command = [sys.executable, "-m", "unmask", "sandbox", "serve", "--num-workers", "1", "--port", str(port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--token-file", str(self.token_file)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.said = self.process.stdout.readline()
        if not self.said:
            assert "a program can" not in self.log.read_text()
            pytest.skip(f"programs cannot be confined here: {self.log.read_text()}")
        self.url = re.search(r"http://127\.0\.0\.1:\d+", self.said)[0]
        self.port = int(self.url.rpartition(":")[2])

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=180)
        self.said += self.process.stdout.read()
        self.process.stdout.close()
        return code

    def client(self, **settings) -> RemoteSandbox:
        """Of this server, which need not run."""
        found = copy(self._client)
        vars(found).update(settings)
        return found


def ask(port: int, method="POST", path="/judge", body: bytes | None = b"", token=TOKEN, **headers) -> tuple[int, dict]:
    """Status and JSON of a request as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        given = {"Authorization": f"Bearer {token}", "Content-Length": str(len(body or b""))}
        for name, value in (given | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def wait_until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def verdict_of(**fields) -> bytes:
    true = {
        "status": "correct",
        "passed": [True, True],
        "num_tests": 2,
        "reason": "",
        "cpu_seconds": 0.1,
        "peak_bytes": 9,
    }
    return message(verdict=true | fields)


HEALTHY = {
    "level": "landlock(ABI 7)+seccomp", "self_test": "passed", "attacks": 19, "workers": 1, "packages": ["numpy"],
    "python": "3.12.1", "running": 0, "waiting": 0,
}  # fmt: skip


class Liar:
    """Answers every request with the next of the given bytes; the last one again and again."""

    def __init__(self, *answers: bytes):
        self.answers, self.asked = list(answers), 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.answer, daemon=True).start()

    def answer(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(1 << 16)
                length = int((re.search(rb"Content-Length: (\d+)", head) or [0, 0])[1])
                body = len(head.partition(b"\r\n\r\n")[2])
                while body < length:
                    body += len(connection.recv(1 << 16))
                self.asked += 1
                said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                with suppress(OSError):
                    connection.sendall(said)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)


def http_answer(status: int, content: bytes) -> bytes:
    return f"HTTP/1.1 {status} x\r\nLocation: http://evil/\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def lying(*answers: bytes, **settings) -> tuple[Liar, RemoteSandbox]:
    liar = Liar(http_answer(200, message(**HEALTHY)), *answers)
    return liar, RemoteSandbox(liar.url, TOKEN, **settings)
