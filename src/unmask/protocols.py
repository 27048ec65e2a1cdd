"""How papers evaluated: lengths, steps, blocks, prompts and parsers, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.errors import ConfigError

LENGTHS = (128, 256, 512)
PLANNING = ("sudoku", "countdown")

_OPENING = "<reasoning>"
"""What d1's script begins every answer with, and ESPO's after it."""

_D1_TASKS: Mapping[str, Mapping[str, Any]] = {
    "sudoku": {"prompt": "d1", "parser": "d1", "opening": _OPENING, "num_drawn": 256},
    "countdown": {"prompt": "d1", "parser": "lenient", "opening": _OPENING},
    "gsm8k": {"prompt": "d1_boxed", "parser": "lenient", "opening": _OPENING},
    "math": {"prompt": "d1_boxed", "parser": "lenient", "opening": _OPENING},
    "code": {"prompt": "chat"},
}


@dataclass(frozen=True)
class Protocol:
    """One paper's. `steps` is "half" of the length, "full", "half_of_planning" (full elsewhere), or a number."""

    source: str
    steps: str | int
    tasks: Mapping[str, Mapping[str, Any]]
    """Task options by task."""
    block_length: int = 32

    def num_steps(self, task: str, gen_length: int) -> int:
        """Denoising steps for a length."""
        if isinstance(self.steps, int):
            return min(self.steps, gen_length)
        is_half = self.steps == "half" or (self.steps == "half_of_planning" and task in PLANNING)
        return gen_length // 2 if is_half else gen_length


PROTOCOLS = {
    "d1": Protocol("arXiv:2504.12216", "half", _D1_TASKS),
    "espo": Protocol(
        "arXiv:2512.03759",
        "half_of_planning",
        {
            **_D1_TASKS,
            "sudoku": {**_D1_TASKS["sudoku"], "prompt": "espo"},
            "gsm8k": {"prompt": "espo", "parser": "lenient"},
            "math": {"prompt": "espo", "parser": "lenient"},
        },
    ),
    "spg": Protocol(
        "arXiv:2510.09541",
        "half",
        {**_D1_TASKS, "sudoku": {**_D1_TASKS["sudoku"], "prompt": "spg", "grids": "spg", "num_test": 256}},
    ),
    "dmpo": Protocol("arXiv:2510.08233", "full", _D1_TASKS),
    "dga": Protocol("Diffusion-Gibbs Alignment", 128, _D1_TASKS),
}


def task_options(preset: str, task: str) -> dict[str, Any]:
    """What a protocol says about a task. Raises: ConfigError if it says nothing, or does not exist."""
    if preset not in PROTOCOLS:
        raise ConfigError(f"--preset {preset}: unknown. Use one of: {', '.join(PROTOCOLS)}.")
    options = PROTOCOLS[preset].tasks
    if task not in options:
        raise ConfigError(f"--preset {preset} says nothing about task {task!r}. It has: {', '.join(options)}.")
    return dict(options[task])
