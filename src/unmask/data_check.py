"""A look at a data file before a run: what its rows are, how long, how often the same, and what does not fit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask.demonstrations import messages
from unmask.errors import DataError
from unmask.models import MaskedPolicy
from unmask.preferences import preference
from unmask.rows import prompt_of
from unmask.tasks.stdio import is_stdio_row, stdio

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Lengths:
    """Of one kind of text: smallest, median, 95th percentile, largest; characters, or tokens of a model."""

    name: str
    unit: str
    numbers: tuple[int, int, int, int]
    too_long: int = 0
    """Texts beyond the limit, which a run refuses."""

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[int], limit: int | None = None) -> Lengths:
        ranked = sorted(values)
        last = len(ranked) - 1
        numbers = (ranked[0], ranked[last // 2], ranked[round(0.95 * last)], ranked[last])
        return cls(name, unit, numbers, sum(value > limit for value in values) if limit is not None else 0)


@dataclass
class Report:
    """What was found. `problems` are rows that a run would refuse."""

    kind: str
    num_rows: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    lengths: list[Lengths] = field(default_factory=list)
    num_repeated_rows: int = 0
    num_repeated_prompts: int = 0
    problems: list[str] = field(default_factory=list)
    rendered: str = ""
    """The first prompt as the model reads it."""


def check_rows(
    rows: Iterable[tuple[str, Any]],
    *,
    policy: MaskedPolicy | None = None,
    max_length: int | None = None,  # tokens of prompt and completion that the model has places for
    gen_length: int | None = None,  # tokens of a completion
) -> Report:
    """Look at every row; nothing is raised for a bad one, it is counted. Raises: DataError if there is no row."""
    found = list(rows)
    if not found:
        raise DataError("the file holds no rows. Give one JSON object per line.")
    kind, read = kind_of(found[0][1])
    report = Report(kind, len(found), columns_of([row for _, row in found if isinstance(row, Mapping)]))
    texts: dict[str, list[str]] = {}
    prompts: list[Any] = []
    for number, (where, row) in enumerate(found):
        try:
            prompt, answers = read(row, number, where)
            rendered = {"prompt": render(prompt, policy), **answers}
        except DataError as error:
            report.problems.append(str(error))
            continue
        prompts.append(prompt)
        for name, text in rendered.items():
            texts.setdefault(name, []).append(text)
    if prompts:
        report.rendered = texts["prompt"][0]
    report.num_repeated_rows = repeated(json.dumps(row, sort_keys=True, default=str) for _, row in found)
    report.num_repeated_prompts = repeated(json.dumps(prompt, sort_keys=True, default=str) for prompt in prompts)
    for name, values in texts.items():
        limit = None
        if policy is not None and gen_length is not None:
            limit = gen_length if name != "prompt" else (max_length or 0) - gen_length
        count = len if policy is None else (lambda text: len(policy.encode(text)))
        unit = "characters" if policy is None else "tokens"
        report.lengths.append(Lengths.of(name, unit, [count(text) for text in values], limit))
    return report


Reader = Callable[[Any, int, str], tuple[Any, dict[str, str]]]


def kind_of(row: Any) -> tuple[str, Reader]:
    """What rows like this one are for, and how to read them."""
    names = set(row) if isinstance(row, Mapping) else set()
    if "chosen" in names or "rejected" in names:
        return "preference pairs", read_pair
    if "completion" in names or "messages" in names:
        return "prompts with completions", read_demonstration
    if is_stdio_row(row):
        return "programs judged by what they print", read_stdio
    return "prompts", read_prompt


def read_pair(row: Any, number: int, where: str) -> tuple[Any, dict[str, str]]:
    pair = preference(row, number, where)
    return pair.example.prompt, {"chosen": pair.chosen, "rejected": pair.rejected}


def read_demonstration(row: Any, number: int, where: str) -> tuple[Any, dict[str, str]]:
    if isinstance(row, Mapping) and "messages" in row:
        turns = messages(row["messages"], where)
        return turns[:-1], {"completion": turns[-1]["content"]}
    prompt = prompt_of(row, where)
    completion = row["completion"]
    if isinstance(completion, str) and completion:
        return prompt, {"completion": completion}
    return prompt, {"completion": messages(completion, where)[-1]["content"]}


def read_prompt(row: Any, number: int, where: str) -> tuple[Any, dict[str, str]]:
    return prompt_of(row, where), {}


def read_stdio(row: Any, number: int, where: str) -> tuple[Any, dict[str, str]]:
    try:
        columns = stdio(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: is no program with inputs and outputs ({error}). Mend or drop it.") from error
    return columns["question"], {"solution": columns["solution"]} if columns["solution"] else {}


def render(prompt: Any, policy: MaskedPolicy | None) -> str:
    """As a model reads it; without one, turns after each other."""
    if policy is not None:
        return policy.render(prompt)
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each column with the types of its values and, where it is not in every row, the share that has it."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        kinds = Counter(type(row[name]).__name__ for row in rows if name in row)
        share = sum(kinds.values()) / len(rows)
        found[name] = " or ".join(kinds) + (f", in {100 * share:.0f} % of the rows" if share < 1 else "")
    return found


def repeated(texts: Iterable[str]) -> int:
    """How many are equal to an earlier one."""
    return sum(count - 1 for count in Counter(texts).values())
