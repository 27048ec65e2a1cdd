"""MBPP's own prompt with examples (arXiv:2108.07732): its tasks 2, 3 and 4 in front, read from the user's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unmask.errors import DataError
from unmask.tasks.prompts import Messages, PromptStyle

BEGIN, DONE = "[BEGIN]", "[DONE]"
FIRST_SHOWN = 2
"""Task number of the first example; the others follow it."""
MAX_SHOTS = 9
"""The authors keep tasks 1 to 10 for prompts."""

_ASKS = "You are an expert Python programmer, and here is your task: {question}\n"
STYLES: Mapping[str, PromptStyle] = {
    "mbpp": PromptStyle(_ASKS, opening=f"{BEGIN}\n"),
    "mbpp_text": PromptStyle(f"{_ASKS}{BEGIN}\n", is_chat=False),
}
"""As turns of a conversation whose last answer is begun, and as one text."""


def task_and_tests(text: str, tests: Sequence[str]) -> str:
    """The question of a row with all its tests."""
    return f"{text} Your code should pass these tests:\n\n" + "\n".join(test.strip() for test in tests)


def question_of(columns: Mapping[str, Any]) -> str:
    """What these styles ask. Raises: DataError for a row that has no list of tests."""
    found = columns.get("task_and_tests")
    if found is None:
        raise DataError(
            f"row {columns['task_id'] or columns['question'][:40]!r}: prompt 'mbpp' needs rows of MBPP with test_list. "
            "Use prompt 'chat', or other rows."
        )
    return str(found)


def shown_rows(rows: Sequence[Mapping[str, Any]], count: int, source: str) -> list[Mapping[str, Any]]:
    """The rows of the examples, in their order. Raises: DataError if one is missing."""
    by_id = {columns["task_id"]: columns for columns in rows if columns.get("task_and_tests")}
    wanted = [str(FIRST_SHOWN + place) for place in range(count)]
    missing = [number for number in wanted if number not in by_id]
    if missing:
        raise DataError(
            f"{source}: has no row of MBPP with task_id {missing[0]}, and prompt 'mbpp' shows tasks "
            f"{', '.join(wanted)}. Name rows that have them by task.shots_data."
        )
    return [by_id[number] for number in wanted]


def turns_of(shown: Sequence[Mapping[str, Any]]) -> Messages:
    """The examples as turns."""
    turns: Messages = []
    for columns in shown:
        turns.append({"role": "user", "content": _ASKS.replace("{question}", question_of(columns))})
        turns.append({"role": "assistant", "content": _answer(columns)})
    return turns


def text_of(shown: Sequence[Mapping[str, Any]]) -> str:
    """The examples as one text, to stand in front of a question."""
    texts = [f"{_ASKS.replace('{question}', question_of(columns))}{_answer(columns)}" for columns in shown]
    return "".join(f"{text}\n\n" for text in texts)


def _answer(columns: Mapping[str, Any]) -> str:
    return f"{BEGIN}\n{columns['solution'].strip()}\n{DONE}"


def program_in(answer: str, first_block: str | None) -> str:
    """The program of an answer: up to [DONE], without what opens it and without quotes around it. `first_block` is the
    code block in it, if the model wrote one instead."""
    if first_block is not None:
        return first_block
    answer = answer.partition(DONE)[0]  # a base model goes on with examples of its own
    text = (answer.partition(BEGIN)[2] if BEGIN in answer else answer).strip("\r\n")
    bare = text.strip()
    if len(bare) > 1 and bare[0] == bare[-1] == "'" and not bare.startswith("'''"):
        return bare[1:-1]
    return text
