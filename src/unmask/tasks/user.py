"""A task made of a user's data and reward functions, without a line in the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unmask.errors import ConfigError, RewardError
from unmask.rows import cached_rows, prompt_of
from unmask.tasks.common import LeavesLengthToSampler, first_id, held_out, require_at_least, require_choices
from unmask.tasks.rewards import SIGNATURES, Batch, Outcome, call, find_function
from unmask.types import Example, Score, Status


@dataclass(frozen=True)
class UserTask(LeavesLengthToSampler):
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
        require_choices(self, signature=SIGNATURES, prompt=("column",))
        require_at_least(self, max_error_share=0, num_validation=1)
        if self.max_error_share >= 1:
            raise ConfigError(f"task.max_error_share = {self.max_error_share}: must be a share below 1. Try 0.1.")

    def source(self, split: str) -> str:
        """The file or hub id of a split. Raises: ConfigError if there is none to train on."""
        if split == "test" and self.data:
            return self.data
        if self.train_data is None:
            raise ConfigError(f"task.train_data is missing: {self.data} is for the test alone. Name rows to train on.")
        return self.train_data

    def examples(self, split: str) -> list[Example]:
        """The rows of a split; columns are all but `prompt`."""
        offset, source = first_id(split, "the data"), self.source(split)
        is_test = split == "test" and source == self.data
        part, key = ("test", "task.data") if is_test else ("train", "task.train_data")
        rows: Sequence[tuple[str, Any]] = cached_rows(source, part, key)
        if not is_test:
            rows = held_out(rows, split, self.num_validation, source)
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
        outcomes = [call(function, self.signature, batch) for function in self.functions]
        self._check_errors(outcomes, examples)
        return [self._score(place, outcomes, examples[place]) for place in range(len(batch))]

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
        prompt = prompt_of(row, where)
        if not self.system:
            return prompt
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [{"role": "system", "content": self.system}, *turns]
