"""A user's own reward functions: found by name, called with a whole batch, their failures kept apart from low rewards.

    def reward(prompts, completions, **columns) -> list[float | None]          TRL's signature, the default
    def compute_score(data_source, solution_str, ground_truth, extra_info)     verl's, by signature = "verl"

Both may be `async`. A name is `module:function` or `path/to/file.py:function`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask.user_code import find_callable

SIGNATURES = ("trl", "verl")


@dataclass
class Outcome:
    """What a function said about B completions."""

    values: list[float | None]
    """None: not applicable, or the call failed."""
    errors: dict[int, str] = field(default_factory=dict)
    """What the function raised, by row."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of `log_metric`: about the batch."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Of `log_extra`: one value for each row."""


@dataclass(frozen=True)
class Batch:
    """Completions to judge. Chat prompts have completions [{"role": "assistant", "content": ...}], as in TRL."""

    prompts: Sequence[Any]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.completions)

    def row(self, place: int) -> Batch:
        columns = {name: [values[place]] for name, values in self.columns.items()}
        return Batch([self.prompts[place]], [self.completions[place]], columns)


def find_function(name: str) -> Callable[..., Any]:
    """The function that a recipe names. Raises: ConfigError saying what is not there."""
    return find_callable(name, "task.rewards")


def call(function: Callable[..., Any], signature: str, batch: Batch) -> Outcome:
    """Call a function on a batch. If that fails, each row is called alone, so that only the guilty ones are lost."""
    outcome = Outcome([None] * len(batch))
    if signature == "verl":
        _call_rows(function, signature, batch, outcome)
        return outcome
    try:
        outcome.values = _checked(_trl(function, batch, outcome), len(batch))
    except Exception:
        outcome.metrics.clear()
        outcome.extras.clear()
        _call_rows(function, signature, batch, outcome)
    return outcome


def _call_rows(function: Callable[..., Any], signature: str, batch: Batch, outcome: Outcome) -> None:
    for place in range(len(batch)):
        row = batch.row(place)
        try:
            given = _verl(function, row) if signature == "verl" else _trl(function, row, outcome)
            (outcome.values[place],) = _checked(given, 1)
        except Exception as error:
            outcome.errors[place] = f"{type(error).__name__}: {error}"


def _trl(function: Callable[..., Any], batch: Batch, outcome: Outcome) -> Any:
    is_chat = [isinstance(prompt, list) for prompt in batch.prompts]
    completions = [
        [{"role": "assistant", "content": text}] if chat else text
        for chat, text in zip(is_chat, batch.completions, strict=True)
    ]
    extra = {
        "trainer_state": None,
        "log_extra": outcome.extras.__setitem__,
        "log_metric": outcome.metrics.__setitem__,
    }
    columns = dict(batch.columns)
    keywords = {name: value for name, value in {**columns, **extra}.items() if _takes(function, name)}
    return _finished(function(prompts=list(batch.prompts), completions=completions, **keywords))


def _verl(function: Callable[..., Any], row: Batch) -> list[Any]:
    """verl's own columns where the data has them, else every column as extra_info."""
    columns = {name: values[0] for name, values in row.columns.items()}
    truth = columns.get("ground_truth", columns.get("answer"))
    info = columns.get("extra_info", columns)
    found = _finished(
        function(
            data_source=columns.get("data_source", ""),
            solution_str=row.completions[0],
            ground_truth=truth,
            extra_info=info,
        )
    )
    return [found["score"] if isinstance(found, Mapping) else found]


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _finished(value: Any) -> Any:
    return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Any) -> Any:
    return await value


def _checked(values: Any, count: int) -> list[float | None]:
    """Raises: ValueError unless there is one finite number or None for each row."""
    found = list(values)
    if len(found) != count:
        raise ValueError(f"returned {len(found)} values for {count} completions")
    for value in found:
        if value is not None and not math.isfinite(float(value)):
            raise ValueError(f"returned {value}, which is no finite number")
    return [None if value is None else float(value) for value in found]
