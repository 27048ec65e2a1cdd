"""What tasks share: splits and the ids of their examples, choices that are checked, lengths left to the sampler."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from unmask.errors import ConfigError
from unmask.types import Example

SPLITS = ("train", "validation", "test")
IDS_PER_SPLIT = 10_000_000
"""Example ids: the row within the split, plus this much for each split before it."""

Row = TypeVar("Row")


def first_id(split: str, task: str) -> int:
    """Id of the first example of a split. Raises: ConfigError for a split that no task has."""
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r} of {task}. Known: {', '.join(SPLITS)}.")
    return SPLITS.index(split) * IDS_PER_SPLIT


def held_out(rows: Sequence[Row], split: str, num_validation: int, source: str, num_first: int = 0) -> Sequence[Row]:
    """The rows of "train" or "validation": validation is the end of the training data.

    `num_first` rows at its beginning are neither, since every prompt shows them. Raises: ConfigError if nothing would
    be left to train on.
    """
    if len(rows) <= num_validation + num_first:
        raise ConfigError(
            f"task.num_validation = {num_validation}: {source} has {len(rows)} rows, and validation takes the last of "
            f"them{' and the prompt the first' if num_first else ''}. Use fewer."
        )
    return rows[num_first:-num_validation] if split == "train" else rows[-num_validation:]


def require_counts(task: Any, *fields: str) -> None:
    """Raises: ConfigError for a number of examples that is below 1 or more than a split has ids for."""
    for field in fields:
        if not 1 <= getattr(task, field) <= IDS_PER_SPLIT:
            raise ConfigError(f"task.{field} = {getattr(task, field)}: from 1 to {IDS_PER_SPLIT} are possible.")


def require_choices(task: Any, **known: Collection[str]) -> None:
    """Raises: ConfigError for a field of the task that is none of its known values."""
    for field, values in known.items():
        require_choice(field, getattr(task, field), values)


def require_choice(field: str, value: Any, known: Collection[str], more: str = "") -> None:
    """Raises: ConfigError, with `more` and the nearest known value, if the value is not known."""
    if value in known:
        return
    near = difflib.get_close_matches(str(value), list(known), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"task.{field} = {value!r} is not known. Known: {', '.join(known)}.{more}{hint}")


def require_at_least(task: Any, **least: float) -> None:
    """Raises: ConfigError for a field of the task that is below its least value, or no finite number."""
    for field, value in least.items():
        if not value <= getattr(task, field) < float("inf"):
            raise ConfigError(f"task.{field} = {getattr(task, field)}: must be at least {value:g} and finite.")


class LeavesLengthToSampler:
    """Members of a task that declares no length of its own and reports no examples apart."""

    @property
    def gen_length(self) -> int | None:
        """None: the length is the sampler's to say."""
        return None

    @property
    def num_steps(self) -> int | None:
        """None: the steps are the sampler's to say."""
        return None

    def stratum(self, example: Example) -> str:
        """Reported apart: nothing."""
        return ""
