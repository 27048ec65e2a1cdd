"""What a recipe names by module and attribute: a user's own rewards, engines and the like."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError


def find_callable(name: str, key: str) -> Callable[..., Any]:
    """The function or class of `module:name` or `path/to/file.py:name`. Raises: ConfigError saying what is not there;
    `key` is the recipe's."""
    module, colon, attribute = name.rpartition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f"{key} = {name!r}: must be module:function or path/to/file.py:function.")
    try:
        found: Any = _load_file(Path(module)) if module.endswith(".py") else _load_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(f"{key} = {name!r}: cannot be imported ({error}). Check the module and name.") from error
    if not callable(found):
        raise ConfigError(f"{key} = {name!r}: is a {type(found).__name__}, a function is required.")
    return found  # type: ignore[no-any-return]


def _load_module(name: str) -> Any:
    """Import a module; the working directory counts, as it does for `python -m`."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _load_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"unmask_user_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
