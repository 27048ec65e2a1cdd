"""A task made of a user's data and reward functions, without a line in the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unmask.errors import ConfigError, DataError, RewardError
from unmask.rows import cached_rows
from unmask.tasks.rewards import SIGNATURES, Batch, Outcome, call, find_function
from unmask.types import Example, Score, Status

SPLITS = ("train", "validation", "test")
IDS_PER_SPLIT = 10_000_000
"""Example ids: the row within the split, plus this much for each split before it."""


@dataclass(frozen=True)
class UserTask:
    """Your own prompts and rewards. A row has `prompt` (text or messages) and any columns that the rewards read."""

    train_data: str | None = None
    """Rows to train on: JSON lines, a JSON array, Parquet, CSV, a directory saved by datasets, or a hub id. The last
    `num_validation` rows are kept for validation."""
    data: str | None = None
    """Rows for the final evaluation, likewise. None: the validation rows."""
    rewards: tuple[str, ...] = ()
    """Reward functions, `module:function` or `path/to/file.py:function`; their values are added up."""
    weights: tuple[float, ...] = ()
    """A factor for each reward. Empty: 1."""
    signature: str = "trl"
    """"trl": f(prompts, completions, **columns) -> a list of numbers or None. "verl": f(data_source, solution_str,
    ground_truth, extra_info) -> a number or {"score": ...}, for each row."""
    correct_from: float = 1.0
    """A completion counts as correct in evaluations if its reward is at least this."""
    max_error_share: float = 0.0
    """Share of a batch in which rewards may raise before the run stops. Completions without a reward get 0, the status
    "error" and a place in the metric train/reward_errors."""
    num_validation: int = 64
    """Rows at the end of `train_data` that are kept for validation."""
    system: str = ""
    """A system turn in front of every prompt; a text prompt then becomes the user's turn."""
    prompt: str = "column"
    """How prompts are made: as the column has them. There is no other."""

    def __post_init__(self) -> None:
        if self.train_data is None and self.data is None:
            raise ConfigError("task.train_data is missing: name a file with rows that have a prompt.")
        if not self.rewards or isinstance(self.rewards, str):
            raise ConfigError('task.rewards is missing: name functions, such as ["my_rewards:length"].')
        if self.weights and len(self.weights) != len(self.rewards):
            raise ConfigError(f"task.weights: {len(self.weights)} for {len(self.rewards)} rewards. Give one for each.")
        if self.signature not in SIGNATURES or self.prompt != "column":
            raise ConfigError(f"task.signature = {self.signature!r}: use one of {', '.join(SIGNATURES)}.")
        if not 0 <= self.max_error_share < 1 or self.num_validation < 1:
            raise ConfigError("task.max_error_share is a share below 1, task.num_validation at least 1.")

    @property
    def gen_length(self) -> int | None:
        """None: the length is the sampler's to say."""
        return None

    @property
    def num_steps(self) -> int | None:
        """None: the steps are the sampler's to say."""
        return None

    def source(self, split: str) -> str:
        """The file or hub id of a split."""
        return str(self.data if split == "test" and self.data else self.train_data or self.data)

    def examples(self, split: str) -> list[Example]:
        """The rows of a split; columns are all but `prompt`."""
        if split not in SPLITS:
            raise ConfigError(f"unknown split {split!r} of the data. Known: {', '.join(SPLITS)}.")
        rows = list(cached_rows(self.source(split), "test" if split == "test" and self.data else "train", "task.data"))
        if not (split == "test" and self.data):
            if len(rows) <= self.num_validation:
                raise ConfigError(
                    f"task.num_validation = {self.num_validation}: {self.source(split)} has {len(rows)} rows, and "
                    "validation takes the last of them. Use fewer."
                )
            first = 0 if split == "train" else len(rows) - self.num_validation
            rows = rows[first : len(rows) - self.num_validation if split == "train" else len(rows)]
        offset = SPLITS.index(split) * IDS_PER_SPLIT
        return [
            Example(offset + number, self._prompt(row, where), {k: v for k, v in row.items() if k != "prompt"})
            for number, (where, row) in enumerate(rows)
        ]

    def score(self, example: Example, completion: str) -> Score:
        """One completion alone."""
        return self.score_all([example], [completion])[0]

    def score_all(
        self,
        examples: Sequence[Example],
        completions: Sequence[str],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        state: Any = None,
    ) -> list[Score]:
        """All completions of a batch, each function called once. Facts: each reward by its name, and what it logged.

        Raises: RewardError if functions raised for more than `max_error_share` of the batch, or one completion has no
        reward that applies.
        """
        names = sorted({name for example in examples for name in example.columns})
        columns = {name: [example.columns.get(name) for example in examples] for name in names}
        if completion_ids is not None:
            columns["completion_ids"] = list(completion_ids)
        batch = Batch([example.prompt for example in examples], completions, columns)
        outcomes = [call(function, self.signature, batch, state) for function in self.functions]
        self._check_errors(outcomes, examples)
        return [self._score(place, outcomes, examples[place]) for place in range(len(batch))]

    def stratum(self, example: Example) -> str:
        """Reported apart: nothing."""
        return ""

    @cached_property
    def functions(self) -> list[Any]:
        """The reward functions. Raises: ConfigError for one that is not there."""
        return [find_function(name) for name in self.rewards]

    def _score(self, place: int, outcomes: Sequence[Outcome], example: Example) -> Score:
        values = [outcome.values[place] for outcome in outcomes]
        failed = any(place in outcome.errors for outcome in outcomes)
        facts: dict[str, float] = {"reward_errors": float(failed)}
        for name, outcome, value in zip(self.rewards, outcomes, values, strict=True):
            facts |= outcome.metrics
            if value is not None:
                facts[f"rewards/{name.rpartition(':')[2]}"] = value
        if failed:
            return Score(0.0, Status.ERROR, facts | {"accuracy": 0.0})
        weights = self.weights or (1.0,) * len(values)
        parts = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        if not parts:
            raise RewardError(
                f"no reward applies to prompt {example.id}: all of {', '.join(self.rewards)} returned None. "
                "Drop the row, or add a reward for it."
            )
        total = sum(parts)
        is_correct = total >= self.correct_from
        return Score(total, Status.CORRECT if is_correct else Status.WRONG, facts | {"accuracy": float(is_correct)})

    def _check_errors(self, outcomes: Sequence[Outcome], examples: Sequence[Example]) -> None:
        for name, outcome in zip(self.rewards, outcomes, strict=True):
            if len(outcome.errors) > self.max_error_share * len(examples):
                place, reason = next(iter(outcome.errors.items()))
                raise RewardError(
                    f"{name} failed for {len(outcome.errors)} of {len(examples)} completions, at first for prompt "
                    f"{examples[place].id}: {' '.join(reason.split())[:200]}. Mend it, or raise task.max_error_share "
                    f"(now {self.max_error_share:g})."
                )

    def _prompt(self, row: Any, where: str) -> str | list[dict[str, str]]:
        prompt = row.get("prompt") if isinstance(row, Mapping) else None
        is_text = isinstance(prompt, str) and bool(prompt)
        if not is_text and not _is_chat(prompt):
            raise DataError(f"{where}: has no prompt. Give a text, or a list of messages with role and content.")
        if not self.system:
            return prompt  # type: ignore[return-value]
        turns = [{"role": "user", "content": prompt}] if is_text else prompt
        return [{"role": "system", "content": self.system}, *turns]  # type: ignore[misc]


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in prompt)
    )
