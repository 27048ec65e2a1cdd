"""Where things lie: on this machine by environment variable, or on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def cache_directory() -> Path:
    """`$UNMASK_CACHE`, by default ~/.cache/unmask: supervised bases that several runs start from."""
    return Path(os.environ.get("UNMASK_CACHE") or Path.home() / ".cache" / "unmask")


def data_directory() -> Path | None:
    """`$UNMASK_DATA`, the folder of published task data; None if it is not set."""
    value = os.environ.get("UNMASK_DATA")
    return Path(value) if value else None


def is_hub_id(name: str) -> bool:
    """Whether the text can only mean a repository of the hub: `owner/name`, and no directory `owner` is here."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and not os.path.exists(name.split("/")[0])
