"""Rows of programs that read standard input, as in APPS: a question, inputs, and the outputs that belong to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ASKS = "The program reads standard input and prints its answer to standard output."


def is_stdio_row(row: Any) -> bool:
    """Whether a row has inputs and outputs, or APPS's column that holds both."""
    return isinstance(row, Mapping) and ("input_output" in row or {"inputs", "outputs"} <= set(row))


def stdio(row: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a row {"question", "inputs", "outputs"} or APPS's {"question", "input_output", "solutions"}.

    Raises: ValueError for other numbers of inputs than of outputs, for none, and for rows that call a function.
    """
    found = row
    if "input_output" in row:
        found = json.loads(row["input_output"]) if isinstance(row["input_output"], str) else row["input_output"]
        if not isinstance(found, Mapping):
            raise ValueError("input_output holds no inputs and outputs")
        if found.get("fn_name"):
            raise ValueError("fn_name: a row that calls a function is not read; give its tests as test_cases")
    inputs, outputs = ([as_text(value) for value in found[name]] for name in ("inputs", "outputs"))
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs; one output for each of at least one input")
    if not any(text.strip() for text in outputs):
        raise ValueError("all outputs are blank, so a program that does nothing passes")
    return {
        "question": f"{row['question'].rstrip()}\n\n{ASKS}",
        "solution": first_solution(row),
        "tests": outputs,
        "stdin": inputs,
        "setup": "",
        "helpers": "",
        "names": [],
        "task_id": str(row.get("problem_id", row.get("id", ""))),
    }


def as_text(value: Any) -> str:
    """A text, or a list of lines. Raises: ValueError for anything else."""
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"an input or output is a {type(value).__name__}; a text or a list of lines is required")
    return "\n".join(lines)


def first_solution(row: Mapping[str, Any]) -> str:
    """The reference program; "" if there is none."""
    given = row.get("solutions") or row.get("solution") or ""
    if isinstance(given, str) and given.lstrip().startswith("["):
        given = json.loads(given)
    return str(given[0]) if isinstance(given, list) and given else given if isinstance(given, str) else ""
