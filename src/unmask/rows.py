"""Rows of data files: JSON lines, JSON arrays, both also gzipped, what the package datasets reads, and the hub."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.optional import optional
from unmask.places import is_hub_id

FORMATS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
"""Files that are read through the package datasets, and their names there."""

OWN_SUFFIXES = (".json", ".jsonl", ".gz")
"""Endings that are never a hub id."""


def read_rows(source: str, split: str, key: str = "data.file") -> Iterator[tuple[str, Any]]:
    """(place, row) of everything in a file, a directory saved by datasets, or a hub data set.

    A hub id is `owner/name`, or `owner/name:configuration`. `key` is what the user calls the source, for messages.

    Raises: DataError naming the place if something cannot be read; ConfigError if datasets is needed and missing.
    """
    file = Path(source)
    is_remote = is_hub_id(source.split(":")[0]) and not file.exists() and file.suffix not in OWN_SUFFIXES
    if file.suffix in FORMATS or file.is_dir() or is_remote:
        yield from _rows_of_datasets(source, split, key)
        return
    text = read_text(file, key)
    if text.lstrip().startswith("["):
        for number, row in enumerate(_parsed(text, str(file)), start=1):
            yield f"{file} row {number}", row
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at breaks inside a string
        if line.strip():
            yield f"{file} line {number}", _parsed(line, f"{file} line {number}")


def cached_rows(source: str, split: str, key: str = "data.file") -> tuple[tuple[str, Any], ...]:
    """`read_rows`, kept for the next split; a file that has changed is read again."""
    stamp: tuple[int, ...] = ()
    with suppress(OSError, ValueError):
        found = os.stat(source)
        stamp = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
    return _rows_of(source, split, key, stamp)


@lru_cache(maxsize=8)
def _rows_of(source: str, split: str, key: str, stamp: tuple[int, ...]) -> tuple[tuple[str, Any], ...]:
    return tuple(read_rows(source, split, key))


def prompt_of(row: Any, where: str) -> str | list[dict[str, str]]:
    """The prompt of a row: a text, or messages with role and content. Raises: DataError if there is none."""
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_turn(turn) for turn in prompt):
        return [dict(turn) for turn in prompt]
    raise DataError(f"{where}: has no prompt. Give a text, or a list of messages with role and content.")


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def read_text(file: Path, key: str = "data.file") -> str:
    """The content of a data file, unpacked if its name ends with .gz.

    Raises: DataError if it cannot be read or is not UTF-8.
    """
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: cannot be read ({reason}). Check {key}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text. Convert the file to UTF-8.") from error
    except ValueError as error:  # a zero byte in the name
        raise DataError(f"{key} = {str(file)!r}: cannot be read ({error}). Name a file.") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON. Give one JSON object per line, or one array of objects.") from error


def _rows_of_datasets(source: str, split: str, key: str) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet, CSV or Arrow file, a directory that datasets has saved, or a data set of the hub."""
    file = Path(source)
    datasets = optional("datasets", "data")
    try:
        if file.is_dir():
            loaded = datasets.load_from_disk(str(file))
            rows = loaded[split] if isinstance(loaded, Mapping) else loaded
        elif file.suffix in FORMATS:
            rows = datasets.load_dataset(FORMATS[file.suffix], data_files=str(file), split="train")
        else:
            name, _, configuration = source.partition(":")
            rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # of many kinds, from a missing file to a refused connection
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{key} = {source!r}: cannot be read by datasets ({reason}). Name a file or a hub id."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source} row {number}", row
