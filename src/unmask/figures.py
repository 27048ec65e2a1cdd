"""Images: matplotlib where it is installed, endings checked before the work, files that appear whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.optional import optional
from unmask.runs import replace_file


def load_pyplot() -> Any:
    """matplotlib.pyplot. Raises: ConfigError if it is not installed."""
    return optional("matplotlib.pyplot", "plot")


def check_figure(file: Path) -> None:
    """Raises: ConfigError, before anything is drawn, if matplotlib is missing or cannot write the file's ending."""
    kinds = optional("matplotlib.backend_bases", "plot").FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in kinds:
        raise ConfigError(f"{file}: no image format ends like this. Use an ending such as .png, .svg or .pdf.")


def save_figure(figure: Any, file: Path, *, dpi: int = 110) -> None:
    """Write a figure in the format of the file's ending, and close it."""
    try:
        replace_file(file, lambda temporary: figure.savefig(temporary, dpi=dpi, format=file.suffix.lstrip(".").lower()))
    finally:
        load_pyplot().close(figure)
