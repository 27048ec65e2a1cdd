"""The plan of a comparison and the directory that holds it: who may go on with what."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask import __version__
from unmask.build import supervised_base
from unmask.comparison.arms import Arm, comparison_notes, read_arms
from unmask.config import differences
from unmask.errors import ConfigError, UnmaskError
from unmask.estimation import estimate_run
from unmask.estimation.machines import Setting
from unmask.runs import RunDirectory, write_atomic

PLAN = "plan.json"


@dataclass(frozen=True)
class Run:
    """One arm under one seed, and its files: `seed0/` is the run directory, what is beside it belongs to us."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / f"seed{self.seed}"

    def beside(self, ending: str) -> Path:
        return self.folder / f"seed{self.seed}.{ending}"

    @property
    def is_finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    @property
    def is_begun(self) -> bool:
        """There is something that `--resume` can go on with."""
        return (self.path / "config.toml").is_file()


@dataclass(frozen=True)
class Comparison:
    """Arms, seeds and rollouts, and the directory for all of it."""

    recipe: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    budget: int
    directory: Path
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """Seed by seed, so that a comparison that is stopped early has seen every arm."""
        return [Run(arm, seed, self.directory / arm.directory) for seed in self.seeds for arm in self.arms]

    @property
    def first(self) -> Arm:
        """What the others are compared with."""
        return self.arms[0]

    def identity(self) -> dict[str, Any]:
        """What must be the same for a directory to be gone on with."""
        return {
            "unmask": __version__,
            "budget": self.budget,
            "seeds": list(self.seeds),
            "order": [arm.label for arm in self.arms],
            "arms": {arm.label: arm.tree() for arm in self.arms},
        }

    def missing_bases(self) -> list[tuple[Path, int]]:
        """(supervised recipe, seed) of bases that are not in the cache; each once."""
        wanted = {
            (Path(a.recipe.model.recipe), s): None for a in self.arms if a.recipe.model.recipe for s in self.seeds
        }
        return [pair for pair in wanted if not (supervised_base(*pair)[1] / "summary.json").is_file()]


def plan_comparison(
    recipe: str | Path, overrides: Sequence[str], arms: str, seeds: str, budget: int, directory: str | Path
) -> Comparison:
    """Everything checked that can be without a model. Raises: ConfigError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("compare starts processes of its own, one for each run. Start it without a launcher.")
    found = read_arms(recipe, overrides, arms, budget)
    notes = comparison_notes(recipe, found)
    return Comparison(Path(recipe), tuple(found), read_seeds(seeds), budget, Path(directory), tuple(notes))


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds of --seeds. Raises: ConfigError."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: must be different integers separated by commas, such as 0,1,2.")
    return seeds


def check_directory(comparison: Comparison) -> bool:
    """True if the directory holds this comparison already; False if it is free.

    Raises: ConfigError if it holds anything else.
    """
    directory = comparison.directory
    if not (directory / PLAN).is_file():
        RunDirectory(directory).check_new()
        return False
    try:
        stored = json.loads((directory / PLAN).read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{directory / PLAN}: damaged. Name a new directory with --output.") from None
    changed = differences(stored, json.loads(json.dumps(comparison.identity())))
    if changed:
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise ConfigError(
            f"--output {directory}: holds a comparison with another plan, which differs in {shown}. "
            "Give the command that it began with, or name a new directory."
        )
    return True


def write_plan(comparison: Comparison) -> None:
    """Create the directory. FLOPs are counted once, here, since they take seconds for each arm."""
    flops = {arm.label: count_flops(arm) for arm in comparison.arms}
    comparison.directory.mkdir(parents=True, exist_ok=True)
    content = {"recipe": str(comparison.recipe), "identity": comparison.identity(), "flops": flops}
    write_atomic(comparison.directory / PLAN, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_flops(comparison: Comparison) -> dict[str, dict[str, float] | None]:
    """What `count_flops` said of each arm."""
    flops: dict[str, dict[str, float] | None] = json.loads((comparison.directory / PLAN).read_text("utf-8"))["flops"]
    return flops


def count_flops(arm: Arm) -> dict[str, float] | None:
    """{"training", "evaluation"} FLOPs of one run: 2ND a sequence forward, 4ND backward, N all parameters.

    None where the model's shape cannot be found out without loading it.
    """
    try:
        costs = estimate_run(arm.recipe, Setting()).costs
    except UnmaskError:
        return None
    evaluation = sum(cost.formula_flops for cost in costs if cost.passes.phase == "evaluate")
    return {"training": sum(cost.formula_flops for cost in costs) - evaluation, "evaluation": evaluation}


@contextmanager
def only_here(directory: Path) -> Iterator[int]:
    """Hold the directory, also by the children that inherit the yielded descriptor.

    Raises: ConfigError if another process works in it.
    """
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(
            f"--output {directory}: a comparison, or a run of one that was killed, still works there. Wait for it."
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
