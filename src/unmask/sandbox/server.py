"""The local sandbox behind HTTP, for trainers elsewhere: `unmask sandbox serve`. The client is sandbox/remote.py."""

from __future__ import annotations

import hmac
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from unmask.errors import ConfigError
from unmask.sandbox.pool import LocalSandbox
from unmask.sandbox.protocol import (
    HEALTH,
    JUDGE,
    MAX_REQUEST,
    QUEUE_SECONDS,
    REFUSALS,
    ProtocolError,
    ends_within,
    message,
    read_program,
    verdict_message,
)  # fmt: skip
from unmask.sandbox.self_test import num_attacks
from unmask.sandbox.verdicts import BrokenTests, LostWorker

HEAD_SECONDS = 10.0
"""For who has not shown the token yet."""
READ_SECONDS = 60.0
"""For a request to arrive."""
LINGER_SECONDS = 2.0
"""For a client to read why it was refused before the connection goes."""
POLL_SECONDS = 0.1
"""Between two looks for a signal."""
STOP_SECONDS = 30.0
"""For programs that run when the server is told to stop."""
SPARE_CONNECTIONS = 16
"""More than can run and wait, for questions about health and for refusals."""


class Busy(Exception):
    """There is no turn to be had. The text is a key of REFUSALS."""


class Gate:
    """Lets so many programs run at a time and so many wait."""

    def __init__(self, num_workers: int, queue: int):
        self.num_workers, self.queue = num_workers, queue
        self.running = self.waiting = 0
        self._changed = threading.Condition()
        self._is_closed = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for a worker. Raises: Busy if none is free in time, too many wait already, or the gate is closed."""
        with self._changed:
            if self.running >= self.num_workers and self.waiting >= self.queue:
                raise Busy("busy")
            self.waiting += 1
            try:
                is_free = self._changed.wait_for(
                    lambda: self._is_closed or self.running < self.num_workers, QUEUE_SECONDS
                )
            finally:
                self.waiting -= 1
            if self._is_closed or not is_free:
                raise Busy("stopping" if self._is_closed else "busy")
            self.running += 1
        try:
            yield
        finally:
            with self._changed:
                self.running -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Who waits is sent away; who runs is left alone."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class Server(ThreadingHTTPServer):
    """A thread for each of a bounded number of connections. Raises: ConfigError for an address not to be had."""

    daemon_threads = True

    def __init__(self, pool: LocalSandbox, token: str, host: str, port: int, queue: int):
        self.pool, self.token, self.gate = pool, token, Gate(pool.num_workers, queue)
        self.open = 0
        self._limit = pool.num_workers + queue + SPARE_CONNECTIONS
        self._counting = threading.Lock()
        self.request_queue_size = min(self._limit, 1024)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or error
            raise ConfigError(f"--host {host} --port {port}: not to be had ({said}). Choose another.") from error

    def server_bind(self) -> None:
        """As HTTPServer's, without asking a name server for the name of the host."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._counting:
            is_full = self.open >= self._limit
            self.open += not is_full
        if is_full:
            with suppress(OSError):
                request.setblocking(False)
                request.send(b"HTTP/1.0 503 busy\r\nContent-Type: application/json\r\n\r\n" + refusal("busy"))
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._has_closed()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._has_closed()

    def _has_closed(self) -> None:
        with self._counting:
            self.open -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event; a fault of this server is named, without what was sent to it."""
        error = sys.exception()
        if not isinstance(error, OSError):
            note(f"{client_address[0]}: {type(error).__name__} in the server")

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def health(self) -> dict[str, Any]:
        return {
            "level": self.pool.level,
            "self_test": "passed",  # or there would be no pool
            "attacks": num_attacks(in_namespaces=self.pool.level.startswith("namespaces")),
            "workers": self.pool.num_workers,
            "packages": list(self.pool.packages),
            "python": platform.python_version(),
            "running": self.gate.running,
            "waiting": self.gate.waiting,
        }


class Handler(BaseHTTPRequestHandler):
    """One request. Nothing is read of a body before the token was right, and nothing of a request is logged."""

    server: Server
    timeout = READ_SECONDS

    def handle(self) -> None:
        with ExitStack() as self._reading:
            self._reading.enter_context(ends_within(self.connection, HEAD_SECONDS))
            super().handle()

    def do_GET(self) -> None:
        if self._is_authorized():
            if self.path == HEALTH:
                self._answer(200, message(**self.server.health()))
            else:
                self._refuse("unknown")

    def do_POST(self) -> None:
        if not self._is_authorized():
            return
        if self.path != JUDGE:
            self._refuse("unknown")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20) or "Transfer-Encoding" in self.headers:
            self._refuse("malformed", "a Content-Length is required")
        elif int(length) > MAX_REQUEST:
            self._refuse("too_large", f"{length} bytes, at most {MAX_REQUEST} are taken")
        else:
            content = self.rfile.read(int(length))
            self._reading.close()  # it has arrived, now it may take as long as it takes
            self._judge(content)

    def _judge(self, content: bytes) -> None:
        try:
            program = read_program(content)
            with self.server.gate.turn():
                verdict = self.server.pool.run_one(program)
        except ProtocolError as error:
            self._refuse(error.kind, str(error))
        except Busy as error:
            self._refuse(str(error))
        except BrokenTests as error:
            self._answer(200, message(broken=error.reason))
        except LostWorker:
            self._refuse("lost")
        except Exception as error:  # whatever it is, the client is told that there is no verdict
            self._refuse("failed", type(error).__name__)
        else:
            self._answer(200, verdict_message(verdict))

    def _is_authorized(self) -> bool:
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        is_right = hmac.compare_digest(given, f"Bearer {self.server.token}".encode())
        if not is_right:
            self._refuse("unauthorized")
            return False
        self._reading.close()
        self._reading.enter_context(ends_within(self.connection, READ_SECONDS))
        return True

    def _refuse(self, kind: str, more: str = "") -> None:
        note(f"{self.client_address[0]}: refused, {kind}{f': {more}' if more else ''}")
        self._answer(REFUSALS[kind][0], refusal(kind, more))

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """For requests that the base class does not understand; it would show them again."""
        self.requestline, self.close_connection = "", True
        self._refuse("malformed", f"HTTP {code}")

    def finish(self) -> None:
        """Reads on for a moment: closed with bytes unread, a connection would be reset, and the answer lost."""
        super().finish()
        with suppress(OSError), ends_within(self.connection, LINGER_SECONDS):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):
                pass

    def log_message(self, format: str, *arguments: Any) -> None:
        """See note()."""


def refusal(kind: str, more: str = "") -> bytes:
    text = REFUSALS[kind][1] + (f" ({more})" if more else "")
    return message(refused=kind, text=f"{text}.")


def note(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)


def serve(server: Server, announce: Callable[[Server], None]) -> None:
    """Until SIGTERM or SIGINT; then nothing new is taken, and what runs is finished and answered.

    Raises: KeyboardInterrupt for the second signal.
    """
    told: list[int] = []  # no Event: its lock may be held by what the signal interrupts

    def stop(number: int, _: object) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        announce(server)
        while not told:  # woken by itself: the signal may be taken by another thread than this one, which handles it
            time.sleep(POLL_SECONDS)
        server.gate.close()
        server.shutdown()
        server.server_close()
        end = time.monotonic() + STOP_SECONDS
        while server.open and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        server.pool.close()
        for number, handler in before.items():
            signal.signal(number, handler)
