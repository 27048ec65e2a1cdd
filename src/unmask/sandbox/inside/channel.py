"""Messages over a socket or pipe: four bytes of length, then so many bytes."""

from __future__ import annotations

import os
import struct

from wire import MAX_BYTES, WireError


def send(descriptor: int, *messages: bytes) -> None:
    """Raises: OSError if the other side is gone, WireError if a message is too long."""
    if max(map(len, messages), default=0) > MAX_BYTES:
        raise WireError("a message is too long")
    view = memoryview(b"".join(struct.pack("=I", len(content)) + content for content in messages))
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> bytes:
    """Raises: EOFError if the other side is gone, WireError for a length that no message has."""
    (length,) = struct.unpack("=I", _exactly(descriptor, 4))
    if length > MAX_BYTES:
        raise WireError("a message is too long")
    return _exactly(descriptor, length)


def _exactly(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
