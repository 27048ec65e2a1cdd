"""unmask: reinforcement learning for masked diffusion language models.

The public names below are stable within a minor version. They are imported when first used, so that `import unmask`
and `unmask --help` are quick; importing unmask also lets transformers' Auto classes load its model families, whichever
of the two packages is imported first.
"""

from __future__ import annotations

import importlib
from typing import Any

from unmask import _auto

__version__ = "0.1.0"

_PUBLIC = {
    "load": "unmask.models",
    "MODELS": "unmask.models",
    "ALGORITHMS": "unmask.objectives",
    "TASKS": "unmask.tasks",
    "SAMPLERS": "unmask.samplers",
    "train": "unmask.api",
    "sft": "unmask.api",
    "evaluate": "unmask.api",
    "sample": "unmask.api",
    "elbo": "unmask.api",
    "eubo": "unmask.api",
    "log_likelihood": "unmask.api",
    **dict.fromkeys(
        (
            "Algorithm", "Corruption", "Example", "LossInputs", "LossOutput", "Needs", "Policy", "PromptBatch",
            "Rollouts", "Sampler", "Samples", "Score", "Status", "Task",
        ),
        "unmask.types",
    ),
}  # fmt: skip

__all__ = ["__version__", *_PUBLIC]

_auto.register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
