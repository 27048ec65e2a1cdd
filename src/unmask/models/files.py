"""Where a model's files are and what stands in them, before any class is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from unmask.errors import ModelError
from unmask.places import is_hub_id

# never *.py and never pickles
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def fetch(name: str | Path) -> Path:
    """The directory itself, or the local snapshot of a hub repository, downloaded if it is not in the cache.

    `HF_HUB_OFFLINE=1` keeps it to the cache. Raises: ModelError if there is no such directory and no such snapshot.
    """
    if not is_hub_id(str(name)):
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=_WANTED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{name}: no such directory, and not in the local hub cache; the hub cannot be reached or HF_HUB_OFFLINE "
            "is set. Name a model directory, or download it where there is a network."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{name}: no such directory, and the hub does not give it ({one_line(error)}). Check the name and "
            "your access."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ModelError with the way out if it cannot be read or is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}). Make the file readable.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not a JSON object ({one_line(error)}). Restore the file.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: not a JSON object ({type(content).__name__}). Restore the file.")
    return content


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without references to Python files that are not saved beside it.

    `auto_map` entries of the form `owner/name--file.Class` name a repository, and stay.
    """
    out = dict(config)
    references = out.get("auto_map")
    if isinstance(references, Mapping) and not all("--" in str(value) for value in references.values()):
        del out["auto_map"]
    return out


def check_variant(given: Mapping[str, Any], only: Mapping[str, Any], family: str) -> None:
    """Raises: ValueError for a variant that no released checkpoint uses. None in `given` stands for the usual."""
    for key, value in only.items():
        if given.get(key) not in (None, value):
            raise ValueError(f"{key} = {given[key]!r}: this variant of {family} is not built, only {value!r} is")
    rope = given.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type = {rope['rope_type']!r}: this variant of {family} is not built, only 'default' is")


def published(written: Mapping[str, Any], config: Any, architecture: str) -> dict[str, Any]:
    """A configuration as its authors write it: their class name, and rotary numbers where their class reads them."""
    out = {**portable(written), "architectures": [architecture]}
    out.pop("_name_or_path", None)  # a path of this machine
    rope = config.rope_parameters if isinstance(config.rope_parameters, Mapping) else {}
    return out | {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
