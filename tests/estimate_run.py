"""Trains two recipes in a process of its own and prints by how much its memory grew in the second, in bytes.

    python -m tests.estimate_run WARM_UP.json RECIPE.json OUTPUT

Growth is the highest resident size from the moment before the model is built to the end of the run, less the size at
that moment. The first recipe, a small one, brings in what is imported and kept once. One process measures one recipe: a
large run before it would leave a heap in pieces, over which the next one's small tensors spread. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from unmask import launch
from unmask.build import Named, Recipe, train_recipe
from unmask.run_log import SilentView
from unmask.types import Example, Score, Status


@dataclass(frozen=True)
class Letters:
    """Prompts of 64 letters; the reward is the share of letters a. Costs no memory, unlike puzzles."""

    prompt: str = "raw"
    gen_length: int = 64
    num_steps: int = 4

    def examples(self, split: str) -> list[Example]:
        return [Example(id=i, prompt="abcdefgh" * 8) for i in range(8)]

    def score(self, example: Example, completion: str) -> Score:
        return Score(completion.count("a") / 64, Status.WRONG, {"accuracy": 0.0})

    def stratum(self, example: Example) -> str:
        return ""

    def source(self, split: str) -> str:
        return split


def read(file: Path) -> Recipe:
    """The recipe in a JSON file, with the task above in place of its own."""
    recipe = train_recipe(json.loads(file.read_text()), Path())
    return replace(recipe, task=Named("letters", Letters()))


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def growth(recipe: Recipe, output: Path) -> int:
    before: list[int] = []
    build = launch.base_policy

    def noticed(*args, **kwargs):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free already would hide growth
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest size so far
        before.append(status("VmRSS"))
        return build(*args, **kwargs)

    launch.base_policy = noticed
    try:
        launch.run_recipe(recipe, output, SilentView())
    finally:
        launch.base_policy = build
    return status("VmHWM") - before[0]


if __name__ == "__main__":
    *files, output = map(Path, sys.argv[1:])
    print([growth(read(file), output / file.stem) for file in files][-1])
