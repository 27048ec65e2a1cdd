"""Checkpoints: safetensors for tensors, JSON for the rest, hashes for both; nothing is ever unpickled.

A checkpoint is a directory `step-<name>` with `tensors.safetensors`, `state.json` and `manifest.json` (size and SHA-256
of the other two). It appears by one rename, after its files have reached the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.errors import DataError
from unmask.files import flush
from unmask.types import Batch, Corruption, Draw, Evidence, Rollouts

FORMAT = 2
_CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (Batch, Corruption, Draw, Evidence, Rollouts)}


def pack(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[int, str] | None = None) -> Any:
    """A JSON-ready description of nested dataclasses, lists and dicts; their tensors go into `tensors` under names.

    An object that occurs twice (masks used by several updates) is described once, and is one object again after
    `unpack`.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if is_dataclass(value) and not isinstance(value, type):
        if id(value) in seen:
            return {"same": seen[id(value)]}
        seen[id(value)] = name
        content = {f.name: pack(getattr(value, f.name), f"{name}.{f.name}", tensors, seen) for f in fields(value)}
        return {"class": type(value).__name__, "name": name, "fields": content}
    if isinstance(value, dict):
        return {"dict": {k: pack(v, f"{name}.{k}", tensors, seen) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [pack(v, f"{name}.{i}", tensors, seen) for i, v in enumerate(value)]
    return value


def unpack(content: Any, tensors: dict[str, Tensor], seen: dict[str, Any] | None = None) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    seen = {} if seen is None else seen
    if isinstance(content, list):
        return [unpack(item, tensors, seen) for item in content]
    if not isinstance(content, dict):
        return content
    if "tensor" in content:
        return tensors[content["tensor"]]
    if "same" in content:
        return seen[content["same"]]
    if "dict" in content:
        return {k: unpack(v, tensors, seen) for k, v in content["dict"].items()}
    values = {k: unpack(v, tensors, seen) for k, v in content["fields"].items()}
    seen[content["name"]] = _CLASSES[content["class"]](**values)
    return seen[content["name"]]


def write_checkpoint(parent: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write `parent/step-<name>` and remove all but the newest `keep` checkpoints, by the order of their names.

    Names must differ from boundary to boundary, so that no checkpoint is ever replaced.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".step-*.tmp"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover)
    target, temporary = parent / f"step-{name}", parent / f".step-{name}.{os.getpid()}.tmp"
    temporary.mkdir()
    save_file(tensors, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps({"format": FORMAT, **state}), encoding="utf-8")
    manifest = {name: _fingerprint(temporary / name) for name in ("tensors.safetensors", "state.json")}
    (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for name in (*manifest, "manifest.json"):
        flush(temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    flush(parent)
    for old in list_checkpoints(parent)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(parent: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    return sorted(parent.glob("step-*")) if parent.is_dir() else []


def read_newest(parent: Path, notify: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint whose hashes are right; None if there is no checkpoint at all.

    `notify` is told of every damaged one that is passed over. Raises: DataError if all are damaged.
    """
    checkpoints = list_checkpoints(parent)
    for path in reversed(checkpoints):
        fault = find_fault(path)
        if fault is None:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if state.get("format") != FORMAT:
                raise DataError(f"{path}: has format {state.get('format')}, and this version reads {FORMAT}.")
            return load_file(path / "tensors.safetensors"), state
        notify(f"{path.name} is damaged ({fault}); going back to the one before")
    if checkpoints:
        raise DataError(f"{parent}: every checkpoint is damaged. Start the run again in a new directory.")
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: manifest[name] for name in ("tensors.safetensors", "state.json")}
    except (OSError, ValueError, KeyError, TypeError):
        return "manifest.json is missing or unreadable"
    for name, fingerprint in expected.items():
        try:
            found = _fingerprint(path / name)
        except OSError:
            return f"{name} is missing"
        if found["bytes"] != fingerprint["bytes"]:
            return f"{name} has {found['bytes']} bytes instead of {fingerprint['bytes']}"
        if found != fingerprint:
            return f"{name} has changed since it was written"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
