"""A sandbox on another machine, or in a container: the client of sandbox/server.py.

What a server says is taken as a verdict only if it has the form of one; nothing else of it is shown or believed.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from unmask.errors import ConfigError
from unmask.sandbox.pool import START_SECONDS, SandboxUnavailable, longest
from unmask.sandbox.protocol import (
    HEALTH,
    JUDGE,
    MAX_REQUEST,
    PROTOCOL,
    QUEUE_SECONDS,
    REFUSALS,
    ProtocolError,
    ends_within,
    max_answer,
    program_message,
    read_health,
    read_refusal,
    read_verdict,
)  # fmt: skip
from unmask.sandbox.verdicts import LostWorker, Program, Verdict

CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
"""Seconds between tries, doubled from the first to the longest."""
BUSY_PATIENCE = 10
"""A busy server is waited for so many times as long as one that does not answer."""
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""A machine that is gone is noticed after so many seconds, not when a program's time is over."""

REMEDIES = {
    "malformed": "finds a request malformed: install the same version of unmask on both sides",
    "version": f"speaks another protocol than {PROTOCOL}: install the same version of unmask on both sides",
    "unauthorized": "refuses the token: give both sides the same (task.sandbox.token_file here, --token-file there)",
    "unknown": "has no such address: is the path in task.sandbox.url right?",
    "too_large": f"refuses a program with its tests as too large: more than {MAX_REQUEST:,} bytes are not judged",
    "lost": "lost a worker twice on one program: look at the free memory of that machine",
    "failed": "failed at a program: what it printed says why",
    "busy": "has been busy all the time: start it with more --num-workers, or raise task.sandbox.patience",
    "stopping": "is stopping: start it again with `unmask sandbox serve`",
}
"""What follows from each of REFUSALS."""


class Unreachable(Exception):
    """No answer, or none that says more than "later"; worth another try."""


class Busy(Unreachable):
    """A server that has more to do than it can take on: others may be served first for a long time."""


class Refused(Exception):
    """An answer that another try would not change."""


@dataclass(frozen=True)
class Address:
    """The parts of a URL."""

    url: str
    is_tls: bool
    host: str
    port: int
    prefix: str


def read_url(url: str) -> Address:
    """Raises: ConfigError if it is no http or https address of a host, or holds a user, a query or a fragment."""
    wanted = "must be http://HOST:PORT or https://HOST, without user, query or fragment. Try http://127.0.0.1:8723."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(f"task.sandbox.url: {wanted}") from None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise ConfigError(f"task.sandbox.url: {wanted}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"task.sandbox.url: {wanted}")
    is_tls = parts.scheme == "https"
    return Address(url, is_tls, parts.hostname, port or (443 if is_tls else 80), parts.path.rstrip("/"))


@dataclass
class RemoteSandbox:
    """Runs programs where `url` points. Raises: SandboxUnavailable if no server is there that could be trusted."""

    url: str
    token: str = field(repr=False)
    num_workers: int = 1
    """Programs that are asked about at a time."""
    packages: tuple[str, ...] = ("numpy",)
    """What programs may import there; a server without one of them would find honest programs wrong."""
    patience: float = 60.0
    """Seconds for which a server is tried again that cannot be reached or is busy."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"{self.num_workers} sandbox workers: at least 1 is needed.")
        self._address = read_url(self.url)
        try:
            self.health: dict[str, Any] = self._ask("GET", HEALTH, b"", START_SECONDS, 1 << 16, read_health)
        except (Unreachable, Refused) as error:
            raise SandboxUnavailable(f"{error}. Nothing was judged.") from error
        lacking = [name for name in self.packages if name not in self.health["packages"]]
        if lacking:
            raise SandboxUnavailable(
                f"the sandbox at {self.url} lacks {', '.join(lacking)}, so honest programs would fail there. Start it "
                f"with --packages {','.join(self.packages)}."
            )

    @property
    def level(self) -> str:
        """As the server found it when it started."""
        return f"remote, {self.health['level']}"

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        """A verdict for each program, in their order. Raises: LostWorker if one cannot be had, BrokenTests."""
        with ThreadPoolExecutor(self.num_workers) as threads:
            return list(threads.map(self.run_one, programs))

    def run_one(self, program: Program) -> Verdict:
        """A verdict, after as many tries as `patience` allows. Raises: LostWorker, BrokenTests."""
        try:
            content = program_message(program)
            seconds = QUEUE_SECONDS + longest(program)
            return self._ask(
                "POST", JUDGE, content, seconds, max_answer(program), lambda said: read_verdict(said, program)
            )
        except ProtocolError as error:
            raise LostWorker(f"a program cannot be sent to the sandbox at {self.url}: {error}.") from error
        except (Unreachable, Refused) as error:
            raise LostWorker(f"{error}. No reward was made up; mend it and go on with --resume.") from error

    def close(self) -> None:
        """Nothing is kept open."""

    def _ask(self, method: str, path: str, content: bytes, seconds: float, limit: int, read: Any) -> Any:
        """What `read` makes of an answer. Raises: Unreachable once patience is at its end, Refused, BrokenTests."""
        pause, end = FIRST_PAUSE, None
        while True:
            try:
                return self._once(method, path, content, seconds, limit, read)
            except Unreachable as error:
                now = time.monotonic()
                waits = BUSY_PATIENCE * self.patience if isinstance(error, Busy) else self.patience
                end = now + waits if end is None else end
                if now + pause > end:
                    raise Unreachable(f"the sandbox at {self.url} {error}") from error
            except (Refused, ProtocolError) as error:
                text = f"says what is no answer: {error}" if isinstance(error, ProtocolError) else str(error)
                raise Refused(f"the sandbox at {self.url} {text}") from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(self, method: str, path: str, content: bytes, seconds: float, limit: int, read: Any) -> Any:
        """Raises: Unreachable, Refused, ProtocolError, BrokenTests."""
        status, said = self._exchange(method, path, content, seconds, limit)
        if len(said) > limit:
            raise ProtocolError(f"it is longer than {limit:,} bytes")
        if status == 200:
            return read(said)
        kind = read_refusal(said)
        if status != REFUSALS[kind][0]:
            raise ProtocolError(f"{kind} with the status {status}")
        failure = Busy if kind == "busy" else Unreachable if status == 503 else Refused
        raise failure(REMEDIES[kind])

    def _exchange(self, method: str, path: str, content: bytes, seconds: float, limit: int) -> tuple[int, bytes]:
        """Status and body, of which one byte too many is read. Raises: Unreachable, Refused, ProtocolError."""
        to = self._address
        kind = http.client.HTTPSConnection if to.is_tls else http.client.HTTPConnection
        connection = kind(to.host, to.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            keep_alive(connection.sock)
            connection.sock.settimeout(seconds)
            with ends_within(connection.sock, seconds) as is_over:
                headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
                connection.request(method, to.prefix + path, content or None, headers)
                answer = begun(connection, is_over)
                body = answer.read(limit + 1)
                if len(body) <= limit and answer.length:  # bytes that were promised
                    raise http.client.IncompleteRead(body, answer.length)
                return answer.status, body
        except ssl.SSLCertVerificationError as error:
            raise Refused(f"cannot be trusted ({error.reason}): mend its certificate") from error
        except (http.client.IncompleteRead, OSError) as error:  # RemoteDisconnected is an OSError
            said = getattr(error, "strerror", None) or str(error)[:40] or type(error).__name__
            raise Unreachable(
                f"cannot be reached ({said}, tried for {self.patience:g} s): start it with `unmask sandbox serve`, and "
                "look at the tunnel to it"
            ) from error
        except (http.client.HTTPException, ValueError) as error:  # ValueErrors come from odd headers
            raise ProtocolError(f"no HTTP ({type(error).__name__})") from error
        finally:
            connection.close()


def begun(connection: http.client.HTTPConnection, is_over: threading.Event) -> http.client.HTTPResponse:
    """The answer up to its body. Raises: OSError, HTTPException."""
    try:
        return connection.getresponse()
    except http.client.HTTPException as error:
        if is_over.is_set():  # cut off by us in the middle of a line
            raise TimeoutError from error
        raise


def keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
