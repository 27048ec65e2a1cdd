"""What an interrupted evaluation has finished, kept so that the same command goes on from there.

A file of JSON lines of its own. It grows by a line for each batch, which is on the disk before the next batch begins,
and is removed once everything is written.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, DataError
from unmask.files import flush
from unmask.ranks import failing_together, gather_objects, rank


class Kept:
    """Parts by name and number, and the settings they were made with.

    All processes call its methods together; the first alone reads and writes. The file begins with the first part, and
    is this process's until `close`.

    Raises: ConfigError if another process works on it, DataError if it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.descriptor: int | None = None
        self.unwritten: list[dict[str, Any]] = []  # settings, until there is a part
        rows: list[dict[str, Any]] = []
        with failing_together():
            if rank() == 0 and path.exists():
                self._open()
                try:
                    rows = self._read()
                except BaseException:
                    self.close()
                    raise
        self.rows = gather_objects(rows)[0]

    def check(self, name: str, settings: Mapping[str, Any]) -> None:
        """Remember what parts are made with. Raises: ConfigError if those in the file were made with anything else."""
        now = json.loads(json.dumps(settings))
        with failing_together():
            if rank() != 0:
                return
            before = next((row["settings"] for row in self.rows if row["name"] == name and "settings" in row), None)
            if before is None:
                self.unwritten.append({"name": name, "settings": now})
                return
            for key in [*now, *before]:
                if now.get(key) != before.get(key):
                    raise ConfigError(
                        f"{self.path}: keeps the finished part of an evaluation with {name} {key} = "
                        f"{shown(before.get(key))}, and this one has {shown(now.get(key))}. Give the same command as "
                        "then to go on, or remove that file to start over."
                    )

    def parts(self, name: str) -> dict[int, Any]:
        """Contents by number."""
        return {row["number"]: row["content"] for row in self.rows if row["name"] == name and "number" in row}

    def add(self, name: str, parts: Mapping[int, Any]) -> None:
        """Write parts and wait until they are on the disk."""
        rows = [{"name": name, "number": number, "content": content} for number, content in parts.items()]
        with failing_together():
            if rank() == 0:
                if self.descriptor is None:
                    self._open(os.O_CREAT | os.O_EXCL)
                    flush(self.path.absolute().parent)
                assert self.descriptor is not None
                text = "".join(json.dumps(row) + "\n" for row in [*self.unwritten, *rows])
                with open(self.descriptor, "a", encoding="utf-8", closefd=False) as file:
                    file.write(text)
                os.fsync(self.descriptor)
        self.unwritten = []

    def remove(self) -> None:
        """Once what was to be written is written."""
        if rank() == 0:
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def _open(self, flags: int = 0) -> None:
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | flags, 0o644)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self.descriptor), os.stat(self.path)):
                raise FileNotFoundError  # another one finished and removed it in between
        except (BlockingIOError, FileExistsError, FileNotFoundError):
            self.close()
            raise ConfigError(
                f"{self.path}: another evaluation writes it. Wait for it, or name another file."
            ) from None

    def _read(self) -> list[dict[str, Any]]:
        """The rows; a last line that was cut off by a kill is removed."""
        assert self.descriptor is not None
        with open(self.descriptor, "rb", closefd=False) as file:
            content = file.read()
        end = content.rfind(b"\n") + 1
        os.truncate(self.descriptor, end)
        rows = []
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
                is_whole = isinstance(row["name"], str) and ("settings" in row or {"number", "content"} <= set(row))
            except (ValueError, KeyError, TypeError):
                is_whole = False
            if not is_whole:
                raise DataError(
                    f"{self.path} line {number}: is no finished part of an evaluation. Remove the file to start over."
                )
            rows.append(row)
        return rows


def shown(value: Any) -> str:
    """A setting in a message."""
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
